"""Slow disks, clients that ask for much and take nothing, and those beside them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.nbd.channel import Channel
from blockd.nbd.wire import Cmd
from tests.helpers.nbd_codec import Call, request_bytes
from tests.helpers.nbd_server import DISK_BYTES, RawClient, Rig, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024


@pytest.fixture
def driver() -> WatchedDriver:
    """A disk that does nothing inline."""
    return WatchedDriver(DISK_BYTES)


@pytest.fixture
async def rig(tmp_path: Path, driver: WatchedDriver) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        rig.export(rig.node("other"))
        yield rig


async def send_all(client: RawClient, calls: list[Call]) -> None:
    await client.send(b"".join(request_bytes(call, cookie) for cookie, call in enumerate(calls)))


async def cookies(client: RawClient, count: int) -> list[int]:
    """Those of so many replies without data, none of which is an error."""
    replies = [await client.reply() for _ in range(count)]
    assert all(error == 0 for _, error in replies)
    return [cookie for cookie, _ in replies]


# --- a slow disk ------------------------------------------------------------------------------


async def test_a_slow_disk_gets_a_bounded_number_of_requests(
    rig: Rig, driver: WatchedDriver
) -> None:
    hold = driver.hold("write")
    client, other = await rig.raw(), await rig.raw("other")
    calls = [Call(Cmd.WRITE, number * 512, data=b"x" * 512) for number in range(200)]
    await send_all(client, calls)
    await driver.wait_seen("write", limits.NBD_REQUESTS_IN_FLIGHT)
    await wait_all_tasks_blocked()
    assert driver.counts["write"] == limits.NBD_REQUESTS_IN_FLIGHT
    assert await other.read(0, 4) == bytes(4)
    hold.release()
    assert sorted(await cookies(client, 200)) == list(range(200))
    assert driver.data[: 200 * 512] == b"x" * 200 * 512


async def test_a_slow_disk_gets_a_bounded_number_of_bytes(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NBD_BYTES_IN_FLIGHT", 100 * KIB)
    hold = driver.hold("read")
    client = await rig.raw()
    sizes = [40 * KIB, 40 * KIB, 40 * KIB, 300 * KIB, 40 * KIB]
    await send_all(client, [Call(Cmd.READ, 0, size) for size in sizes])
    await driver.wait_seen("read", 2)
    await wait_all_tasks_blocked()
    assert driver.counts["read"] == 2
    hold.release()
    # The request that is larger than the limit ran too: alone.
    for _ in sizes:
        cookie, _ = await client.reply()
        assert await client.receive(sizes[cookie]) == bytes(sizes[cookie])


async def test_answers_come_as_the_disk_gives_them(rig: Rig, driver: WatchedDriver) -> None:
    hold = driver.hold("write")
    client = await rig.raw()
    await send_all(client, [Call(Cmd.WRITE, data=b"slow"), Call(Cmd.FLUSH), Call(Cmd.TRIM, 0, 4)])
    assert sorted(await cookies(client, 2)) == [1, 2]
    hold.release()
    assert await cookies(client, 1) == [0]


async def test_a_client_that_goes_takes_its_requests_along(rig: Rig, driver: WatchedDriver) -> None:
    driver.hold("write")
    client = await rig.raw()
    await send_all(client, [Call(Cmd.WRITE, at * 512, data=b"x" * 512) for at in range(10)])
    await driver.wait_seen("write", 10)
    await client.close()
    await rig.wait_until_alone()
    async with rig.graph.get("disk").quiesced():
        pass


async def test_that_a_client_goes_is_seen_when_there_is_room_to_hear_of_it(
    rig: Rig, driver: WatchedDriver
) -> None:
    hold = driver.hold("write")
    client = await rig.raw()
    await send_all(client, [Call(Cmd.WRITE, at * 512, data=b"x" * 512) for at in range(100)])
    await driver.wait_seen("write", limits.NBD_REQUESTS_IN_FLIGHT)
    await client.close()
    hold.release()
    await rig.wait_until_alone()
    async with rig.graph.get("disk").quiesced():
        pass


async def test_nobody_spins_for_a_client_whose_requests_run(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await rig.raw()
    await wait_all_tasks_blocked()
    spun = []
    monkeypatch.setattr(Channel, "_receive_later", lambda *args: spun.append(args))
    with driver.hold("write"):
        for number in range(1, 4):
            await client.request(WRITE)
            await driver.wait_seen("write", number)
            await wait_all_tasks_blocked()
    assert sorted(await cookies(client, 3)) == [1, 2, 3]
    assert spun == []


# --- a client that does not read --------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
async def test_a_client_that_never_reads_stays_bounded_and_alone(
    rig: Rig, driver: WatchedDriver, *, inline: bool
) -> None:
    driver.nowait = lambda _: inline
    client, other = await rig.raw(), await rig.raw()
    size = 64 * KIB
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all, client, [Call(Cmd.READ, 0, size)] * 50_000)
        await driver.wait_seen("read", 5)
        await wait_all_tasks_blocked()
        held = driver.counts["read"]
        # What may wait to be sent, and what the kernel takes.
        assert held * size <= (
            limits.NBD_SEND_BUFFER_BYTES
            + limits.NBD_REQUESTS_IN_FLIGHT * size
            + 2 * limits.NBD_SOCKET_SEND_BYTES
        )
        assert await other.read(0, 4) == bytes(4)
        await other.write(0, b"data")
        await wait_all_tasks_blocked()
        assert driver.counts["read"] == held + 1
        nursery.cancel_scope.cancel()
    await rig.server.remove("id-disk", hard=True)
    assert rig.deleted() == ["id-disk"]


async def test_the_socket_takes_a_large_reply_at_once(rig: Rig, driver: WatchedDriver) -> None:
    driver.nowait = lambda _: True
    client = await rig.raw()
    for _ in range(2):
        await client.request(Call(Cmd.READ, 0, 256 * KIB))
    await driver.wait_seen("read", 2)


async def test_a_client_that_never_reads_refusals_stays_bounded(rig: Rig) -> None:
    client, other = await rig.raw(structured=True), await rig.raw()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all, client, [Call(77)] * 200_000)
        await wait_all_tasks_blocked()
        assert await other.read(0, 4) == bytes(4)
        nursery.cancel_scope.cancel()


# --- fairness ---------------------------------------------------------------------------------


class Turns:
    """Time in which a connection's turn is over after so many looks at the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int = 10) -> None:
        ticks = itertools.count()
        tick = limits.NBD_SLICE_SECONDS / looks
        monkeypatch.setattr(time, "monotonic", lambda: next(ticks) * tick)


READ = Call(Cmd.READ, 0, 1)
WRITE = Call(Cmd.WRITE, 0, data=b"x")
LARGER_WRITE = Call(Cmd.WRITE, 0, data=b"x" * 4096)


@pytest.mark.parametrize(
    ("call", "one_turn"),
    [(READ, limits.NBD_BURST_REQUESTS), (WRITE, 11), (LARGER_WRITE, 11)],
    ids=["reads", "tiny writes", "writes"],
)
async def test_a_deep_queue_lets_others_in(
    rig: Rig, driver: WatchedDriver, call: Call, one_turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.nowait = lambda _: True
    busy, other = await rig.raw(), await rig.raw()
    Turns(monkeypatch)
    # Both clients have spoken before the server hears of either.
    queue = request_bytes(call, 1) * 3000
    sent = os.write(busy.stream.socket.fileno(), queue)
    others = WRITE if call is READ else READ
    os.write(other.stream.socket.fileno(), request_bytes(others, 2))
    assert await other.reply() == (2, 0)
    assert driver.seen.index("write" if call is READ else "read") <= 3 * one_turn

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy.send, queue[sent:])
        for _ in range(3000):
            assert await busy.reply() == (1, 0)
            await busy.receive(call.length)


async def test_large_reads_let_others_in(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the socket takes each reply at once."""
    driver.nowait = lambda _: True
    busy, other = await rig.raw(), await rig.raw()
    Turns(monkeypatch, looks=2)
    read = Call(Cmd.READ, 0, 128 * KIB)

    def speak_up(operation: str) -> None:
        if operation == "read" and driver.counts["read"] == 1:
            os.write(other.stream.socket.fileno(), request_bytes(WRITE, 2))

    driver.on_begin = speak_up
    os.write(busy.stream.socket.fileno(), request_bytes(read, 1) * 24)
    assert await other.reply() == (2, 0)
    assert driver.seen.index("write") <= 12
    for _ in range(24):
        assert await busy.reply() == (1, 0)
        await busy.receive(read.length)


async def test_slow_calls_of_one_burst_do_not_add_up(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is too short to send the file's writes to a thread, together they are a long stop."""
    driver.nowait = lambda _: True
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def take_time(_: str) -> None:
        now[0] += 0.9 * limits.INLINE_WRITE_SLOW_NS / 1e9

    driver.on_begin = take_time
    busy, other = await rig.raw(), await rig.raw()
    os.write(busy.stream.socket.fileno(), request_bytes(Call(Cmd.WRITE, data=b"x"), 1) * 100)
    os.write(other.stream.socket.fileno(), request_bytes(READ, 2))
    assert await other.reply() == (2, 0)
    assert driver.seen.index("read") <= 3
    for _ in range(100):
        await busy.reply()
