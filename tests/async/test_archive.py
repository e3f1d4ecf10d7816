"""What changes a bitmap waits until that is durable; so does the end of a backup, and of a node."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Graph
from blockd.errors import BlockdError
from tests.helpers.command_rig import CommandRig, action
from tests.helpers.fake_archive import FakeArchive
from tests.helpers.memory_driver import MemoryDriver

SIZE = 64 * 1024
B: dict[str, Any] = {"node": "disk", "name": "b"}


class Rig(CommandRig):
    def __init__(self, nursery: trio.Nursery) -> None:
        drivers = {"disk": MemoryDriver(SIZE), "target": MemoryDriver(SIZE)}
        super().__init__(nursery, drivers)
        self.archive = FakeArchive()
        self.graph.archive = self.archive

    async def check_waits(self, command: str, **arguments: Any) -> None:
        """The command is answered when the archive has kept the bitmaps, and not before."""
        self.archive.log.clear()
        self.archive.ready = trio.Event()
        answered = trio.Event()

        async def run() -> None:
            await self.execute(command, **arguments)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            assert not answered.is_set(), command
            self.archive.ready.set()
        assert self.archive.log[-1] == "keep disk"


async def test_commands_for_bitmaps_wait() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        await rig.check_waits("block-dirty-bitmap-add", **B, persistent=True)
        await rig.check_waits("block-dirty-bitmap-add", node="disk", name="c")
        await rig.check_waits("block-dirty-bitmap-clear", **B)
        await rig.check_waits("block-dirty-bitmap-disable", **B)
        await rig.check_waits("block-dirty-bitmap-enable", **B)
        await rig.check_waits("block-dirty-bitmap-merge", node="disk", target="b", bitmaps=["c"])
        await rig.check_waits("transaction", actions=[action("block-dirty-bitmap-clear", **B)])
        await rig.check_waits("block-dirty-bitmap-remove", **B)
        await rig.check_waits("block_resize", node_name="disk", size=2 * SIZE)


async def test_nothing_is_kept_of_a_transaction_that_is_refused_or_tried() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        add = action("block-dirty-bitmap-add", **B)
        await rig.rehearse(add)
        with pytest.raises(BlockdError):
            await rig.transact(add, action("abort"))
        assert rig.archive.log == []


async def test_a_transaction_expects_what_it_will_add() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        add = action("block-dirty-bitmap-add", **B, persistent=True)
        await rig.rehearse(add)
        assert rig.archive.log == []
        with pytest.raises(BlockdError, match="aborted"):
            await rig.transact(add, action("abort"))
        assert rig.archive.log == ["expect b on disk", "keep disk"]
        rig.archive.log.clear()
        await rig.transact(add, action("block-dirty-bitmap-clear", **B))
        assert rig.archive.log == ["expect b on disk", "keep disk", "keep disk"]
        rig.archive.log.clear()
        with pytest.raises(BlockdError, match="already exists"):
            await rig.transact(add)
        assert rig.archive.log == []
        assert all(coming.over for coming in rig.archive.coming)


async def test_a_transaction_is_refused_that_adds_what_can_not_be_kept() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        rig.archive.writable = False
        added = {"name": "c", "persistent": True}
        add = action("block-dirty-bitmap-add", node="disk", **added)
        with pytest.raises(BlockdError, match="Bitmap 'c' can't be kept"):
            await rig.transact(action("block-dirty-bitmap-add", **B), add)
        assert rig.nodes["disk"].bitmaps.list() == ()
        assert rig.archive.log == ["expect c on disk"]


async def test_a_persistent_bitmap_has_an_identity_from_the_start() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        await rig.execute("block-dirty-bitmap-add", **B, persistent=True)
        await rig.execute("block-dirty-bitmap-add", node="disk", name="c", persistent=True)
        bitmaps = rig.nodes["disk"].bitmaps
        assert bitmaps.get("b").persistent
        assert bitmaps.get("b").identity != bitmaps.get("c").identity


@pytest.mark.parametrize("fails", [False, True])
async def test_a_backup_is_recorded_until_its_bitmap_is_durable(*, fails: bool) -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        await rig.execute("block-dirty-bitmap-add", **B, persistent=True)
        await rig.write("disk", 0, SIZE)
        if fails:
            rig.drivers["target"].fail("write", errno.EIO)
        rig.archive.log.clear()
        rig.archive.ready = trio.Event()
        backup = {"job_id": "j", "device": "disk", "target": "target", "bitmap": "b"}
        await rig.execute("blockdev-backup", **backup, sync="incremental")
        await wait_all_tasks_blocked()
        assert rig.archive.log == ["record j disk memory incremental b"]
        assert not [event for event in rig.events if event.name == "BLOCK_JOB_COMPLETED"]
        rig.archive.ready.set()
        await wait_all_tasks_blocked()
        assert rig.archive.log[1:] == ["keep disk", "forget j"]
        (end,) = [event for event in rig.events if event.name == "BLOCK_JOB_COMPLETED"]
        assert ("error" in end.data) == fails


async def test_a_node_is_closed_between_two_words_to_the_archive() -> None:
    archive, driver = FakeArchive(), MemoryDriver(SIZE)
    graph = Graph(archive=archive)
    await graph.remove(graph.add("disk", driver, owned=True))
    assert archive.log == ["close disk", "closed disk"]
    assert driver.closed


async def test_a_node_that_could_not_be_flushed_is_not_recorded_as_closed() -> None:
    archive, driver = FakeArchive(), MemoryDriver(SIZE)
    graph = Graph(archive=archive)
    driver.fail("flush", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await graph.remove(graph.add("disk", driver, owned=True))
    assert archive.log == ["close disk"]
    assert driver.closed
