"""Bitmap commands and writes in flight: a mark is never forgotten before its data has arrived."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Graph, Node
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.job import Jobs
from blockd.nbd import NbdServer
from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Dispatcher
from blockd.qmp.services import Services
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.patience import PATIENCE_SECONDS

KIB = 1024
OLD = b"o" * (64 * KIB)
NEW = b"n" * 512
BITMAP = {"node": "disk", "name": "b"}

CHANGES = ("write", "write_zeroes", "discard", "flush")


class Rig:
    """A node, what its driver does, and the commands for it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.driver = MemoryDriver(OLD)
        graph = Graph()
        self.node: Node = graph.add("disk", self.driver, owned=True)
        bus = Bus()

        async def end_service() -> None:
            """Nothing here ends."""

        services = Services(
            graph, Jobs(nursery, bus), NbdServer(nursery, bus), bus, end_service, lambda: None
        )
        self._dispatcher = Dispatcher(COMMANDS, services)

    async def execute(self, command: str, **more: Any) -> Any:
        return await self._dispatcher.execute(command, BITMAP | more)

    async def change(self, operation: str, offset: int = 0) -> None:
        """A guest's request of which ``operation`` is the driver's last part."""
        if operation in ("write", "flush"):
            await self.node.write(offset, memoryview(NEW), fua=operation == "flush")
        elif operation == "write_zeroes":
            await self.node.write_zeroes(offset, len(NEW), unmap=False)
        else:
            await self.node.discard(offset, len(NEW))

    @property
    def dirty_bytes(self) -> int:
        return self.node.bitmaps.get("b").count_bytes


@asynccontextmanager
async def open_rig() -> AsyncIterator[Rig]:
    """A test that hangs fails."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            yield Rig(nursery)


class Command:
    """One that is carried out in a task of its own."""

    def __init__(self, rig: Rig, name: str, **more: Any) -> None:
        self.refused: BlockdError | None = None
        #: What was true of the bitmap of that name at the instant of the command's end.
        self.recording: bool | None = None
        self.count_bytes: int | None = None
        self.ended = trio.Event()
        self._rig = rig
        self._call = (name, more)
        rig.nursery.start_soon(self._run)

    async def _run(self) -> None:
        name, more = self._call
        try:
            await self._rig.execute(name, **more)
        except BlockdError as error:
            self.refused = error
        else:
            bitmap = next((b for b in self._rig.node.bitmaps.list() if b.name == "b"), None)
            if bitmap is not None:
                self.recording, self.count_bytes = bitmap.recording, bitmap.count_bytes
        self.ended.set()


@pytest.mark.parametrize("operation", CHANGES)
async def test_a_bitmap_is_added_after_the_writes_in_flight(operation: str) -> None:
    async with open_rig() as rig:
        with rig.driver.hold(operation) as hold:
            rig.nursery.start_soon(rig.change, operation)
            await hold.reached.wait()
            add = Command(rig, "block-dirty-bitmap-add", granularity=512)
            await wait_all_tasks_blocked()
            assert not add.ended.is_set()
            assert not rig.node.bitmaps.list()
        await add.ended.wait()
        assert add.refused is None
        assert add.recording
        await rig.change("write", 8 * KIB)
        assert rig.node.bitmaps.get("b").usable_bits().intersects(8 * KIB, 512)


@pytest.mark.parametrize("operation", CHANGES)
async def test_a_bitmap_is_cleared_after_the_writes_in_flight(operation: str) -> None:
    """Their data would otherwise arrive behind a mark that is gone."""
    async with open_rig() as rig:
        await rig.execute("block-dirty-bitmap-add", granularity=512)
        with rig.driver.hold(operation) as hold:
            rig.nursery.start_soon(rig.change, operation)
            await hold.reached.wait()
            clear = Command(rig, "block-dirty-bitmap-clear")
            await wait_all_tasks_blocked()
            assert not clear.ended.is_set()
            assert rig.dirty_bytes == len(NEW)
        await clear.ended.wait()
        assert clear.refused is None
        assert clear.count_bytes == 0


async def test_a_write_that_clear_holds_back_is_marked() -> None:
    async with open_rig() as rig:
        await rig.execute("block-dirty-bitmap-add", granularity=512)
        with rig.driver.hold("write") as hold:
            rig.nursery.start_soon(rig.change, "write")
            await hold.reached.wait()
            clear = Command(rig, "block-dirty-bitmap-clear")
            await wait_all_tasks_blocked()
            rig.nursery.start_soon(rig.change, "write", 8 * KIB)
            await wait_all_tasks_blocked()
            assert rig.driver.counts["write"] == 1
        await clear.ended.wait()
        await wait_all_tasks_blocked()
        assert rig.driver.data[8 * KIB : 8 * KIB + len(NEW)] == NEW
        bits = rig.node.bitmaps.get("b").usable_bits()
        assert bits.intersects(8 * KIB, len(NEW))
        assert rig.dirty_bytes == len(NEW)


@pytest.mark.parametrize("operation", CHANGES)
async def test_a_bitmap_is_enabled_after_the_writes_in_flight(operation: str) -> None:
    async with open_rig() as rig:
        await rig.execute("block-dirty-bitmap-add", granularity=512, disabled=True)
        with rig.driver.hold(operation) as hold:
            rig.nursery.start_soon(rig.change, operation)
            await hold.reached.wait()
            enable = Command(rig, "block-dirty-bitmap-enable")
            await wait_all_tasks_blocked()
            assert not enable.ended.is_set()
            assert not rig.node.bitmaps.get("b").recording
        await enable.ended.wait()
        assert enable.refused is None
        assert enable.recording


@pytest.mark.parametrize("command", ["enable", "clear"])
async def test_a_bitmap_that_another_client_replaces_meanwhile(command: str) -> None:
    """Success is only said of the bitmap that has this name then."""
    async with open_rig() as rig:
        await rig.execute("block-dirty-bitmap-add", granularity=512, disabled=True)
        with rig.driver.hold("write") as hold:
            rig.nursery.start_soon(rig.change, "write")
            await hold.reached.wait()
            waiting = Command(rig, f"block-dirty-bitmap-{command}")
            await wait_all_tasks_blocked()
            remove = Command(rig, "block-dirty-bitmap-remove")
            await wait_all_tasks_blocked()
            add = Command(rig, "block-dirty-bitmap-add", granularity=512, disabled=True)
            await wait_all_tasks_blocked()
        for each in (waiting, remove, add):
            await each.ended.wait()
        if waiting.refused is None:
            assert waiting.count_bytes == 0
            assert waiting.recording is (command == "enable")
        else:
            assert waiting.refused.message == "Dirty bitmap 'b' not found"
