"""The stream of requests: cut anywhere, many at once, broken off, and what is no NBD at all."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.extent import Extent
from blockd.nbd.wire import Cmd, CmdFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError, request_bytes
from tests.helpers.nbd_server import DISK_BYTES, RawClient, Rig, in_thread, serving
from tests.helpers.watched_driver import ANSWERS, WatchedDriver

KIB = 1024
CALLS = 200


@pytest.fixture(params=ANSWERS)
def driver(request: pytest.FixtureRequest) -> WatchedDriver:
    driver = WatchedDriver(DISK_BYTES)
    driver.answer(request.param)
    return driver


@pytest.fixture
async def rig(tmp_path: Path, driver: WatchedDriver) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        yield rig


# --- many at once -----------------------------------------------------------------------------


def mixed_calls(rng: random.Random, slots: int, slot_bytes: int) -> list[Call]:
    """Reads and writes, each in a slot that no other touches: their order is free."""
    calls = []
    for number in range(slots):
        length = rng.choice([1, 512, 4096, rng.randint(1, slot_bytes), slot_bytes])
        offset = number * slot_bytes + rng.randint(0, slot_bytes - length)
        if rng.randrange(2):
            calls.append(Call(Cmd.WRITE, offset, data=rng.randbytes(length)))
        else:
            calls.append(Call(Cmd.READ, offset, length))
    return calls


def check(calls: list[Call], results: list[bytes | NbdError], before: bytes, after: bytes) -> None:
    for call, result in zip(calls, results, strict=True):
        if call.cmd == Cmd.READ:
            assert result == before[call.offset : call.offset + call.length]
        else:
            assert result == b""
            assert after[call.offset : call.offset + len(call.data)] == call.data


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_requests_in_a_pipeline_each_get_their_answer(
    rig: Rig, driver: WatchedDriver, seed: int, *, structured: bool
) -> None:
    rng = random.Random(seed)
    before = rng.randbytes(DISK_BYTES)
    driver.data[:] = before
    calls = mixed_calls(rng, CALLS, DISK_BYTES // CALLS)
    client = await rig.raw(structured=structured)
    results = await client.pipeline(calls)
    check(calls, results, before, bytes(driver.data))


@pytest.mark.parametrize(("slots", "slot_bytes"), [(64, 700 * KIB), (16, 2500 * KIB)])
async def test_large_and_small_requests_share_a_pipeline(
    rig: Rig, slots: int, slot_bytes: int
) -> None:
    size = slots * slot_bytes
    driver = WatchedDriver(random.Random(1).randbytes(size))
    rng = random.Random(2)
    driver.nowait = lambda _: rng.randrange(4) > 0
    rig.export(rig.node("large", driver))
    before = bytes(driver.data)
    calls = mixed_calls(rng, slots, slot_bytes)
    client = await rig.raw("large")
    results = await client.pipeline(calls)
    check(calls, results, before, bytes(driver.data))


async def test_buffers_are_used_over_and_over(
    rig: Rig, driver: WatchedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the smallest buffers that may be, every way to run out of one is taken often."""
    monkeypatch.setattr(limits, "NBD_STREAM_BYTES", 4 * KIB)
    monkeypatch.setattr(limits, "NBD_GATHER_BYTES", 2 * KIB)
    monkeypatch.setattr(limits, "NBD_SEND_BYTES", 3 * KIB)
    monkeypatch.setattr(limits, "NBD_RECEIVE_ROOM_BYTES", 3 * KIB)
    monkeypatch.setattr(limits, "NBD_RECEIVE_BUFFER_BYTES", 8 * KIB)
    monkeypatch.setattr(limits, "NBD_SEND_BUFFER_BYTES", 4 * KIB + 64)
    monkeypatch.setattr(limits, "NBD_HANDSHAKE_BYTES", 4 * KIB)
    rng = random.Random(3)
    before = rng.randbytes(DISK_BYTES)
    driver.data[:] = before
    calls = mixed_calls(rng, 2 * CALLS, DISK_BYTES // (2 * CALLS) * 2)[:CALLS]
    client = await rig.raw()
    results = await client.pipeline(calls)
    check(calls, results, before, bytes(driver.data))


# --- in pieces --------------------------------------------------------------------------------

SCRIPT = (
    request_bytes(Call(Cmd.WRITE, 512, data=b"abcdefgh"), 1)
    + request_bytes(Call(Cmd.READ, 510, 12), 2)
    + request_bytes(Call(Cmd.FLUSH), 3)
    + request_bytes(Call(Cmd.READ, DISK_BYTES, 12), 4)
    + request_bytes(Call(Cmd.WRITE, DISK_BYTES, data=b"refused"), 5)
    + request_bytes(Call(Cmd.WRITE, flags=CmdFlag.FUA, data=b"ok"), 6)
    + request_bytes(Call(Cmd.DISC), 7)
)


async def answers_to(client: RawClient) -> dict[int, int]:
    """The error of each request of SCRIPT that gets an answer; the connection ends then."""
    answers = {}
    for _ in range(6):
        cookie, error = await client.reply()
        answers[cookie] = error
        if cookie == 2:
            assert await client.receive(12) == b"\0\0abcdefgh\0\0"
    assert await client.at_end()
    return answers


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 16, 27, 29, 40])
async def test_requests_may_come_in_pieces(
    rig: Rig, driver: WatchedDriver, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One at a time, so that the read comes after the write.
    monkeypatch.setattr(limits, "NBD_REQUESTS_IN_FLIGHT", 1)
    client = await rig.raw()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(0, len(SCRIPT), piece):
                await client.send(SCRIPT[at : at + piece])
                await wait_all_tasks_blocked()

        nursery.start_soon(send)
        assert await answers_to(client) == {1: 0, 2: 0, 3: 0, 4: 22, 5: 28, 6: 0}
    assert driver.data[:2] == b"ok"


async def test_requests_may_come_with_the_last_option(rig: Rig) -> None:
    client = await rig.connect()
    name = b"disk"
    hello = (3).to_bytes(4) + b"IHAVEOPT" + (7).to_bytes(4) + (6 + len(name)).to_bytes(4)
    hello += len(name).to_bytes(4) + name + bytes(2)
    await client.send(hello + request_bytes(Call(Cmd.READ, 0, 4), 9))
    await client.receive(18)
    await client._await_ack()
    assert await client.reply() == (9, 0)
    assert await client.receive(4) == bytes(4)


# --- broken off -------------------------------------------------------------------------------


async def still_serves(rig: Rig) -> None:
    client = await rig.raw()
    await client.write(0, b"alive")
    assert await client.read(0, 5) == b"alive"
    await client.close()


@pytest.mark.parametrize(
    ("length", "sent"), [(512, 100), (200 * KIB, 199 * KIB), (900 * KIB, 600 * KIB)]
)
async def test_a_client_that_vanishes_in_a_payload_leaves_marks_for_what_was_written(
    rig: Rig, driver: WatchedDriver, length: int, sent: int
) -> None:
    bitmap = rig.graph.get("disk").bitmaps.add("b", 512)
    client = await rig.raw()
    request = request_bytes(Call(Cmd.WRITE, 4096, data=b"x" * length), 1)
    await client.send(request[: 28 + sent])
    await client.close()
    await rig.wait_until_alone()

    changed = [at for at, byte in enumerate(driver.data) if byte]
    dirty = [range(extent.offset, extent.end) for extent in bitmap.usable_bits().extents()]
    assert all(any(at in run for run in dirty) for at in changed[:: max(1, len(changed) // 50)])
    assert all(run.stop <= Extent(4096, length + 512).end for run in dirty)
    if length <= limits.NBD_STREAM_BYTES:
        assert changed == []
    await still_serves(rig)


@pytest.mark.parametrize("cut", [1, 17, 27])
async def test_a_client_that_vanishes_in_a_header_is_forgotten(rig: Rig, cut: int) -> None:
    client = await rig.raw()
    await client.send(request_bytes(Call(Cmd.READ, 0, 512), 1)[:cut])
    await client.close()
    await rig.wait_until_alone()
    await still_serves(rig)


async def test_a_client_that_vanishes_before_its_answers_is_forgotten(
    rig: Rig, driver: WatchedDriver
) -> None:
    bitmap = rig.graph.get("disk").bitmaps.add("b", 512)
    client = await rig.raw()
    writes = [Call(Cmd.WRITE, at * 4096, data=b"x" * 4096) for at in range(20)]
    reads = [Call(Cmd.READ, 0, DISK_BYTES) for _ in range(5)]
    for call in writes + reads:
        await client.request(call)
    await client.close()
    await rig.wait_until_alone()
    changed = DISK_BYTES - driver.data.count(0)
    assert bitmap.count_bytes >= changed
    await still_serves(rig)


@pytest.mark.parametrize(
    "garbage",
    [bytes(28), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff" * 300_000],
    ids=["zeroes", "http", "ones"],
)
async def test_garbage_ends_its_own_connection_alone(rig: Rig, garbage: bytes) -> None:
    other = await rig.raw()
    client = await rig.raw()
    await client.request(Call(Cmd.READ, 0, 4))
    await client.send_until_cut_off(garbage)
    assert await other.read(0, 4) == bytes(4)


@pytest.mark.parametrize("garbage", [bytes(100), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100_000])
async def test_garbage_in_the_handshake_ends_its_own_connection_alone(
    rig: Rig, garbage: bytes
) -> None:
    other = await rig.raw()
    client = await rig.connect()
    await client.send_until_cut_off(garbage)
    assert await other.read(0, 4) == bytes(4)


def damaged(rng: random.Random) -> bytes:
    """Requests of which one has wrong bytes, or a few too many or too few."""
    stream = bytearray()
    for cookie in range(rng.randrange(1, 20)):
        length = rng.choice([0, 1, 512, 5000])
        kinds = [Call(Cmd.READ, 0, length), Call(Cmd.WRITE, 0, data=bytes(length))]
        stream += request_bytes(rng.choice([*kinds, Call(rng.randrange(9), 0, length)]), cookie)
    at = rng.randrange(len(stream))
    stream[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(stream)


@pytest.mark.parametrize("seed", range(3))
async def test_streams_with_some_damage_do_no_harm(
    rig: Rig, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        client = await rig.raw(structured=rng.randrange(2) == 0)
        goodbye = request_bytes(Call(Cmd.DISC), 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_until_cut_off, damaged(rng) + goodbye * 300)
            # It may still wait for the rest of a write.
            await wait_all_tasks_blocked()
            await client.stream.send_eof()
    await still_serves(rig)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_of_a_large_write_that_fails_the_rest_is_only_read_over(rig: Rig) -> None:
    disk = WatchedDriver(DISK_BYTES)
    rig.export(rig.node("failing", disk))
    disk.fail("write", errno.EIO)
    client = await rig.raw("failing")
    await client.request(Call(Cmd.WRITE, data=b"x" * 1000 * KIB))
    assert await client.reply() == (1, errno.EIO)
    assert disk.counts["write"] == 1
    await client.write(0, b"next")
    assert disk.data[:4] == b"next"


async def test_a_refused_payload_is_read_over(rig: Rig) -> None:
    """Also one that is larger than all buffers: what follows it is a request again."""

    def converse() -> None:
        with NbdClient.open(rig.path, "disk") as client:
            calls = [
                Call(Cmd.WRITE, DISK_BYTES, data=b"x" * length)
                for length in (1, 4096, 200 * KIB, 600 * KIB, 3000 * KIB)
            ]
            for call in calls:
                results = client.pipeline([call, Call(Cmd.READ, 0, 4)])
                assert results[1] == bytes(4)
                assert isinstance(results[0], Exception)

    await in_thread(converse)
