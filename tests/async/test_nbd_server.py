"""The NBD server's life: it starts, takes clients, refuses some, and ends with all of them."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd.errors import BlockdError
from blockd.listener import UnixAddress
from blockd.nbd import Settings
from blockd.nbd.wire import Cmd, TransmissionFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_server import (
    DISK_BYTES,
    RawClient,
    Rig,
    in_thread,
    serving,
    slow_disk,
)
from tests.helpers.watched_driver import WatchedDriver

GREETING_BYTES = 18


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk"))
        yield rig


async def is_greeted(client: RawClient) -> bool:
    """Whether the server has said anything, now that it has nothing else to do."""
    await wait_all_tasks_blocked()
    readable, _, _ = select.select([client.stream.socket], [], [], 0)
    return bool(readable)


# --- starting and stopping --------------------------------------------------------------------


async def test_a_server_starts_once(rig: Rig) -> None:
    with pytest.raises(BlockdError, match=r"^NBD server already running$"):
        await rig.start()


async def test_of_two_starts_at_once_one_wins(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        await rig.server.stop()
        refused = []

        async def start() -> None:
            try:
                await rig.start()
            except BlockdError as error:
                refused.append(error.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            nursery.start_soon(start)
        assert refused == ["NBD server already running"]
        rig.export(rig.node("disk"))
        client = await rig.raw()
        assert await client.read(0, 4) == bytes(4)


async def test_a_server_stops_once(rig: Rig) -> None:
    await rig.server.stop()
    with pytest.raises(BlockdError, match=r"^NBD server not running$"):
        await rig.server.stop()
    with pytest.raises(BlockdError, match=r"^NBD server not running$"):
        rig.server.check_name("x")
    await rig.server.close()


async def test_stopping_ends_clients_and_exports(rig: Rig) -> None:
    node = rig.graph.get("disk")
    rig.export(node, "second")
    rig.export(rig.node("other"), "third")
    clients = [await rig.raw("disk"), await rig.raw("second"), await rig.connect()]
    await clients[2].receive(GREETING_BYTES)

    await rig.server.stop()
    assert rig.deleted() == ["id-third", "id-second", "id-disk"]
    assert rig.server.exports() == []
    assert not node.users
    assert not Path(rig.path).exists()
    assert [await client.at_end() for client in clients] == [True, True, True]

    await rig.start()
    rig.export(node)
    assert await (await rig.raw()).read(0, 4) == bytes(4)


async def test_stopping_waits_for_what_the_disk_is_doing(rig: Rig) -> None:
    slow = await slow_disk(rig)
    stopped = []

    async def stop(name: str) -> None:
        await rig.server.close()
        stopped.append(name)
        assert not rig.graph.get("slow").users
        assert slow.driver.data[:4] == b"data"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop, "first")
        nursery.start_soon(stop, "second")
        await wait_all_tasks_blocked()
        assert stopped == []
        with pytest.raises(BlockdError, match=r"^NBD server not running$"):
            rig.server.check_name("new")
        with pytest.raises(BlockdError, match=r"^NBD server already running$"):
            await rig.start()
        slow.hold.release()
    assert sorted(stopped) == ["first", "second"]


async def test_a_stop_that_is_cancelled_goes_on(rig: Rig) -> None:
    slow = await slow_disk(rig)
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.server.stop()
    slow.hold.release()
    await rig.server.close()
    assert rig.deleted() == ["id-slow", "id-disk"]


async def test_connections_leave_no_descriptors_behind(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        client = await (rig.raw() if number % 2 else rig.connect())
        await client.close()
    await rig.wait_until_alone()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_mistake_of_ours_ends_one_connection_and_is_logged(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    driver = WatchedDriver(DISK_BYTES)

    def break_down(_: str) -> None:
        raise ZeroDivisionError("a mistake")

    driver.on_begin = break_down
    rig.export(rig.node("broken", driver))
    other, client = await rig.raw(), await rig.raw("broken")
    await client.request(Call(Cmd.READ, 0, 4))
    assert await client.at_end()
    await rig.server.remove("id-broken", hard=False)
    assert await other.read(0, 4) == bytes(4)
    assert "a mistake" in caplog.text


async def test_a_client_that_can_not_be_accepted_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    other = await rig.raw()
    with monkeypatch.context() as patch:

        def refuse(_: socket.socket) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(socket.socket, "accept", refuse)
        client = await rig.connect()
        await wait_all_tasks_blocked()
        assert await other.read(0, 4) == bytes(4)
    mock_clock.jump(1)
    await client.go("disk")
    assert await client.read(0, 4) == bytes(4)


# --- where it listens -------------------------------------------------------------------------


async def test_what_a_killed_server_left_is_replaced(rig: Rig) -> None:
    path = f"{rig.path}.stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    await rig.server.stop()
    await rig.server.start(UnixAddress(path), Settings())
    await rig.server.stop()
    assert not Path(path).exists()


async def test_a_socket_that_is_no_longer_ours_stays(rig: Rig, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        (tmp_path / "nbd.sock").unlink()
        successor = Rig(nursery, tmp_path / "nbd.sock")
        await successor.start()
        await rig.server.stop()
        successor.export(successor.node("disk"))
        client = await successor.raw()
        assert await client.read(0, 4) == bytes(4)
        await successor.close()
    assert not (tmp_path / "nbd.sock").exists()


@pytest.mark.parametrize("trouble", ["gone", "a file"])
async def test_a_directory_that_is_lost_does_not_keep_it_from_stopping(
    tmp_path: Path, trouble: str
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    async with serving(directory) as rig:
        directory.rename(tmp_path / "elsewhere")
        if trouble == "a file":
            directory.write_bytes(b"")
        await rig.server.stop()


# --- how many, how long -----------------------------------------------------------------------


async def test_a_client_over_the_limit_waits_until_another_leaves(tmp_path: Path) -> None:
    async with serving(tmp_path, Settings(max_connections=2)) as rig:
        rig.export(rig.node("disk"))
        first, second = await rig.raw(), await rig.connect()
        await second.receive(GREETING_BYTES)
        third = await rig.connect()
        assert not await is_greeted(third)
        assert await first.read(0, 4) == bytes(4)

        await second.close()
        await third.go("disk")
        assert await third.read(0, 4) == bytes(4)


async def test_stopping_does_not_wait_for_a_client_over_the_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, Settings(max_connections=1)) as rig:
        rig.export(rig.node("disk"))
        await rig.raw()
        waiting = await rig.connect()
        assert not await is_greeted(waiting)
        await rig.server.stop()
        assert await waiting.at_end()


@pytest.mark.parametrize(("most", "several"), [(0, True), (1, False), (2, True)])
async def test_several_connections_are_offered_where_there_may_be_several(
    tmp_path: Path, most: int, *, several: bool
) -> None:
    async with serving(tmp_path, Settings(max_connections=most)) as rig:
        rig.export(rig.node("disk"))
        flags = await in_thread(lambda: _flags(rig.path))
        assert bool(flags & TransmissionFlag.CAN_MULTI_CONN) is several


def _flags(path: str) -> int:
    with NbdClient.connect(path) as client:
        return client.info("disk").flags


async def test_a_client_that_shakes_hands_too_long_is_dropped(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with serving(tmp_path, Settings(handshake_seconds=10)) as rig:
        rig.export(rig.node("disk"))
        silent, ready = await rig.connect(), await rig.raw()
        await silent.receive(GREETING_BYTES)
        await silent.send(bytes(3))
        mock_clock.jump(9)
        await wait_all_tasks_blocked()
        mock_clock.jump(2)
        assert await silent.at_end()
        mock_clock.jump(1000)
        assert await ready.read(0, 4) == bytes(4)


async def test_a_client_may_shake_hands_for_ever_where_nothing_is_said(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with serving(tmp_path, Settings(handshake_seconds=0)) as rig:
        rig.export(rig.node("disk"))
        client = await rig.connect()
        await wait_all_tasks_blocked()
        mock_clock.jump(100_000)
        await client.go("disk")
        assert await client.read(0, 4) == bytes(4)


# --- the log ----------------------------------------------------------------------------------


async def test_lost_clients_are_no_alarm(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await (await rig.connect()).close()
    client = await rig.raw()
    await client.send(b"\x25\x60")
    await client.close()
    await rig.wait_until_alone()
    assert all(record.levelno <= logging.INFO for record in caplog.records)


# --- haggling ---------------------------------------------------------------------------------


async def test_exports_are_listed_in_the_order_of_their_making(rig: Rig) -> None:
    rig.export(rig.node("b"), description="two")
    rig.export(rig.node("a"), "")
    rig.export(rig.node("c"), "c" * 4096)

    def converse() -> None:
        with NbdClient.connect(rig.path) as client:
            assert client.list_exports() == [
                ("disk", ""),
                ("b", "two"),
                ("", ""),
                ("c" * 4096, ""),
            ]
            with pytest.raises(NbdError, match="export 'none' not present"):
                client.info("none")
            assert client.go("").size_bytes == DISK_BYTES
            assert client.read(0, 4) == bytes(4)

    await in_thread(converse)


async def test_the_old_way_to_open_an_export(rig: Rig) -> None:
    def converse() -> None:
        with NbdClient.connect(rig.path) as client:
            assert client.export_name("disk").size_bytes == DISK_BYTES
            client.write(0, b"old")
            assert client.read(0, 3) == b"old"
            client.disconnect()
        with NbdClient.connect(rig.path) as client, pytest.raises(EOFError):
            client.export_name("none")
        with NbdClient.connect(rig.path, flags=1) as client:
            client.export_name("disk")
            assert client.read(0, 3) == b"old"

    await in_thread(converse)
