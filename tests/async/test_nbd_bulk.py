"""Large requests: how they reach the disk, and what goes wrong in their middle."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.extent import Extent
from blockd.nbd.channel import Channel
from blockd.nbd.wire import Cmd
from tests.helpers.nbd_codec import Call, request_bytes
from tests.helpers.nbd_server import RawClient, Rig, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024
PIECE = limits.NBD_STREAM_BYTES
READ_PIECE = limits.NBD_READ_PIECE_BYTES
SIZE = 4 * READ_PIECE


class Disk(WatchedDriver):
    """``writes`` are the ranges that were written."""

    def __init__(self) -> None:
        super().__init__(random.Random(5).randbytes(SIZE))
        self.writes: list[Extent] = []

    def _change(self, operation: str, count: int, offset: int, data: bytes) -> None:
        super()._change(operation, count, offset, data)
        self.writes.append(Extent(offset, len(data)))


@pytest.fixture(params=[True, False], ids=["inline", "waiting"])
def disk(request: pytest.FixtureRequest) -> Disk:
    disk = Disk()
    disk.nowait = lambda _: request.param
    return disk


@pytest.fixture
async def rig(tmp_path: Path, disk: Disk) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", disk))
        yield rig


async def send_in_parts(client: RawClient, data: bytes, *cuts: int) -> None:
    """Send ``data``; what comes up to each cut is received before the rest is sent."""
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        await client.send(data[start:end])
        await wait_all_tasks_blocked()


# --- writes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [27, 28, 29, 28 + 100 * KIB])
async def test_a_write_that_comes_in_parts_is_one_to_the_disk(
    rig: Rig, disk: Disk, cut: int
) -> None:
    client = await rig.raw()
    data = random.Random(1).randbytes(200 * KIB)
    request = request_bytes(Call(Cmd.WRITE, 4096, data=data), 1)
    behind = request_bytes(Call(Cmd.WRITE, 0, data=b"x"), 2)
    await send_in_parts(client, request + behind, cut, cut + 50 * KIB, len(request) + 5)
    assert {await client.reply(), await client.reply()} == {(1, 0), (2, 0)}
    assert disk.writes == [Extent(4096, len(data)), Extent(0, 1)]
    assert disk.data[4096 : 4096 + len(data)] == data


@pytest.mark.parametrize("length", [100 * KIB, PIECE + 4 * KIB])
async def test_what_is_there_behind_a_payload_is_received_with_it(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """So that the client can send more of it while the payload is written."""
    client = await rig.raw()
    received = []

    async def noting(channel: Channel, view: memoryview) -> int:
        received.append(await receive(channel, view))
        return received[-1]

    receive = Channel.receive_some_into
    monkeypatch.setattr(Channel, "receive_some_into", noting)
    request = request_bytes(Call(Cmd.WRITE, 0, data=b"x" * length), 1)
    behind = request_bytes(Call(Cmd.WRITE, length, data=b"y" * 60 * KIB), 2)
    await send_in_parts(client, request + behind, len(request) - 20 * KIB)
    assert {await client.reply(), await client.reply()} == {(1, 0), (2, 0)}
    assert received[-1] == 20 * KIB + len(behind)
    assert disk.data[: length + 60 * KIB] == b"x" * length + b"y" * 60 * KIB


@pytest.mark.parametrize("offset", [0, 512, PIECE - 512])
async def test_pieces_of_a_larger_write_end_where_clusters_do(
    rig: Rig, disk: Disk, offset: int
) -> None:
    client = await rig.raw()
    data = random.Random(2).randbytes(3 * PIECE + 700)
    before = request_bytes(Call(Cmd.WRITE, SIZE - 1, data=b"x"), 1)
    request = request_bytes(Call(Cmd.WRITE, offset, data=data), 2)
    await send_in_parts(client, before + request, len(before) + 1000, len(before) + PIECE + 5)
    assert {await client.reply(), await client.reply()} == {(1, 0), (2, 0)}
    pieces = sorted(write for write in disk.writes if write.length > 1)
    assert pieces[0].offset == offset
    assert all(piece.end % PIECE == 0 for piece in pieces[:-1])
    assert pieces[-1].end == offset + len(data)
    assert disk.data[offset : offset + len(data)] == data


@pytest.mark.parametrize("length", [200 * KIB, 3 * PIECE])
async def test_a_payload_that_ends_while_writes_are_held_up_is_written_later(
    rig: Rig, disk: Disk, length: int
) -> None:
    client = await rig.raw()
    data = b"x" * length
    request = request_bytes(Call(Cmd.WRITE, 0, data=data), 1)
    await send_in_parts(client, request[: 28 + 100 * KIB])
    async with trio.open_nursery() as nursery:
        async with rig.server.get("id-disk").quiesced():
            nursery.start_soon(client.send, request[28 + 100 * KIB :])
            await wait_all_tasks_blocked()
            assert disk.writes == []
        assert await client.reply() == (1, 0)
    assert disk.data[:length] == data


async def test_a_write_that_fails_in_its_middle_is_an_error(rig: Rig, disk: Disk) -> None:
    disk.fail("write", errno.ENOSPC, nth=2)
    client = await rig.raw()
    await client.request(Call(Cmd.WRITE, 0, data=b"x" * 3 * PIECE))
    assert await client.reply() == (1, errno.ENOSPC)
    assert await client.read(0, PIECE) == b"x" * PIECE


# --- reads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("length", [READ_PIECE, READ_PIECE + 1, 3 * READ_PIECE])
async def test_a_large_read_comes_as_one_reply(
    rig: Rig, disk: Disk, length: int, *, structured: bool
) -> None:
    client = await rig.raw(structured=structured)
    [result] = await client.pipeline([Call(Cmd.READ, 512, length)])
    assert result == bytes(disk.data[512 : 512 + length])
    assert all(read.length <= limits.NBD_SEND_BUFFER_BYTES for read in disk.reads)


async def test_a_read_that_fails_in_its_middle_is_an_error_and_no_data(
    rig: Rig, disk: Disk
) -> None:
    disk.fail("read", errno.EIO, nth=2)
    client = await rig.raw()
    await client.request(Call(Cmd.READ, 0, 3 * READ_PIECE))
    assert await client.reply() == (1, errno.EIO)
    assert rig.graph.get("disk").accounts.read.failed == 1
    assert await client.read(0, 4) == disk.data[:4]


async def test_a_client_that_vanishes_in_a_large_reply_is_forgotten(rig: Rig, disk: Disk) -> None:
    client = await rig.raw()
    for _ in range(20):
        await client.request(Call(Cmd.READ, 0, READ_PIECE))
    await client.receive(100 * KIB)
    await client.close()
    await rig.wait_until_alone()
    other = await rig.raw()
    assert await other.read(0, 4) == disk.data[:4]
