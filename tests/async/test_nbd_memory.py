"""What many connections hold together, and what becomes of those that hold it for ever."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.block import FileDriver
from blockd.errors import WouldBlock
from blockd.nbd import memory
from blockd.nbd.memory import Burst
from blockd.nbd.wire import Cmd
from tests.helpers.nbd_codec import Call, request_bytes
from tests.helpers.nbd_server import DISK_BYTES, RawClient, Rig, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def driver() -> WatchedDriver:
    """A disk that does nothing inline."""
    return WatchedDriver(DISK_BYTES)


@pytest.fixture
async def rig(tmp_path: Path, driver: WatchedDriver) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        rig.export(rig.node("inline"))
        yield rig


async def read_whole(client: RawClient, length: int) -> None:
    """Take the reply to a READ."""
    assert (await client.reply())[1] == 0
    assert await client.receive(length) == bytes(length)


async def test_clients_that_wait_hold_no_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Burst] = []

    def make() -> Burst:
        made.append(Burst())
        return made[-1]

    monkeypatch.setattr(memory, "Burst", make)
    clients = [await rig.raw("inline") for _ in range(20)]
    await wait_all_tasks_blocked()
    for _ in range(2):
        for client in clients:
            assert await client.read(0, 1000) == bytes(1000)
    assert len(made) < 4
    # One that has said half of something keeps its own; nobody else's gets into it.
    half = request_bytes(Call(Cmd.WRITE, 0, data=b"half"), 1)
    await clients[0].send(half[:30])
    await wait_all_tasks_blocked()
    await clients[1].write(4, b"x" * 400)
    await clients[0].send(half[30:])
    assert await clients[0].reply() == (1, 0)
    assert await clients[2].read(0, 8) == b"halfxxxx"


async def test_all_connections_together_are_bounded(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NBD_SERVER_BYTES_IN_FLIGHT", 100 * KIB)
    monkeypatch.setattr(limits, "NBD_PRESSING_BYTES", 8 * KIB)
    hold = driver.hold("read")
    first, second, small = await rig.raw(), await rig.raw(), await rig.raw()
    large = Call(Cmd.READ, 0, 40 * KIB)
    for client in (first, second):
        await client.send(request_bytes(large, 1) * 2)
        await wait_all_tasks_blocked()
    # It has nothing yet, and is not kept waiting by those who have much; its second one is.
    await small.send(request_bytes(Call(Cmd.READ, 0, 8 * KIB), 1) * 2)
    await wait_all_tasks_blocked()
    assert driver.counts["read"] == 3
    hold.release()
    for client in (first, second):
        for _ in range(2):
            await read_whole(client, 40 * KIB)
    for _ in range(2):
        await read_whole(small, 8 * KIB)
    assert rig.server._memory._bytes == 0


async def test_what_guests_ask_for_passes_those_who_have_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NBD_SERVER_BYTES_IN_FLIGHT", 4 * MIB)
    driver = WatchedDriver(4 * MIB)
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        hold = driver.hold("read")
        for length in (4 * MIB, 2 * MIB):
            client = await rig.raw()
            await client.send(request_bytes(Call(Cmd.READ, 0, length), 1))
            await wait_all_tasks_blocked()
        assert driver.counts["read"] == 2
        hold.release()
        await read_whole(client, 2 * MIB)


async def test_a_client_that_goes_while_it_waits_for_room_leaves_none_behind(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NBD_SERVER_BYTES_IN_FLIGHT", 100 * KIB)
    monkeypatch.setattr(limits, "NBD_PRESSING_BYTES", 8 * KIB)
    driver.hold("read")
    first, second = await rig.raw(), await rig.raw()
    for client in (first, second):
        await client.send(request_bytes(Call(Cmd.READ, 0, 80 * KIB), 1) * 2)
        await wait_all_tasks_blocked()
    await rig.server.remove("id-disk", hard=True)
    assert rig.server._memory._bytes == 0
    assert not rig.server._memory._turn.locked()


@pytest.mark.parametrize("inline", [True, False])
async def test_a_client_that_never_reads_is_dropped_at_last(
    tmp_path: Path,
    mock_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    *,
    inline: bool,
) -> None:
    async with serving(tmp_path) as rig, trio.open_nursery() as nursery:
        driver = WatchedDriver(DISK_BYTES)
        driver.nowait = lambda _: inline
        rig.export(rig.node("disk", driver))
        client, other = await rig.raw(), await rig.raw()
        await client.send(request_bytes(Call(Cmd.READ, 0, 64 * KIB), 1) * 500)
        await wait_all_tasks_blocked()
        # As long as it takes something now and then, it stays.
        for _ in range(3):
            mock_clock.jump(limits.NBD_UNREAD_SECONDS - 1)
            await client.receive(2 * limits.NBD_SOCKET_SEND_BYTES)
            await wait_all_tasks_blocked()
        assert len(rig.server._exports["id-disk"].connections) == 2
        mock_clock.jump(limits.NBD_UNREAD_SECONDS + 1)
        await wait_all_tasks_blocked()
        assert len(rig.server._exports["id-disk"].connections) == 1
        assert await other.read(0, 4) == bytes(4)
        assert rig.server._memory._bytes == 0
        nursery.cancel_scope.cancel()
    (told,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert told.getMessage() == "NBD: a client was dropped: 'it takes none of its replies'"


class HeldFile(FileDriver):
    """A file whose writes go to a thread, and wait there."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(DISK_BYTES))
        descriptor = os.open(path, os.O_RDWR)
        super().__init__(descriptor, filename=str(path), read_only=False, unmap=True, flushes=False)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def write_nowait(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    def _write(self, offset: int, view: memoryview) -> None:
        self.begun.set()
        self.let_go.wait()
        super()._write(offset, view)


async def test_what_a_dropped_client_has_begun_to_write_ends_before_its_export(
    tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the write would strike an image that others have by then."""
    driver, data = HeldFile(tmp_path / "disk"), os.urandom(100 * KIB)
    async with serving(tmp_path) as rig, trio.open_nursery() as nursery:
        rig.export(rig.graph.add("disk", driver, owned=True))
        client = await rig.raw()
        await client.send(request_bytes(Call(Cmd.WRITE, 0, data=data), 1))
        await trio.to_thread.run_sync(driver.begun.wait)
        await client.send(request_bytes(Call(Cmd.READ, 0, 64 * KIB), 2) * 500)
        await wait_all_tasks_blocked()
        mock_clock.jump(limits.NBD_UNREAD_SECONDS + 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(partial(rig.server.remove, "id-disk", hard=True))
        await wait_all_tasks_blocked()
        gone_early = rig.deleted()
        driver.let_go.set()
        await rig.wait_until_alone()
        assert (tmp_path / "disk").read_bytes() == data + bytes(DISK_BYTES - len(data))
    assert (gone_early, rig.deleted()) == ([], ["id-disk"])
    assert rig.server._memory._bytes == 0
    assert "it takes none of its replies" in caplog.text
