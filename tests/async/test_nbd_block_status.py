"""Block status: what clients are told of allocation and of bitmaps."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from blockd import limits
from blockd.bitmap import DirtyBitmap
from blockd.block import Allocation, Node
from blockd.errors import BlockdError
from blockd.extent import Extent
from blockd.nbd.chunks import status_filter
from blockd.nbd.contexts import RunList
from blockd.nbd.wire import Cmd, CmdFlag, Errno
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_server import DISK_BYTES, Rig, in_thread, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024
GRANULE = 64 * KIB
BASE, DEPTH, DIRTY = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"
#: What is on the disk, and what was written while the bitmap recorded.
DATA = Extent(4 * KIB, 8 * KIB)
WRITTEN = Extent(3 * GRANULE + 5, 7)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        yield rig


@pytest.fixture(params=[False, True], ids=["structured", "extended"])
def extended(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def driver() -> WatchedDriver:
    driver = WatchedDriver(DISK_BYTES)
    driver.data[DATA.offset : DATA.end] = b"x" * DATA.length
    return driver


@pytest.fixture
async def node(rig: Rig, driver: WatchedDriver) -> Node:
    node = rig.node("disk", driver)
    bitmap = node.bitmaps.add("b", GRANULE)
    await node.write(WRITTEN.offset, memoryview(b"y" * WRITTEN.length))
    rig.export(node, bitmaps=[bitmap], allocation_depth=True)
    return node


ALLOCATION = [
    (4 * KIB, 3),
    (8 * KIB, 0),
    (3 * GRANULE - 12 * KIB, 3),
    (512, 0),
    (DISK_BYTES - 3 * GRANULE - 512, 3),
]
DIRTINESS = [(3 * GRANULE, 0), (GRANULE, 1), (DISK_BYTES - 4 * GRANULE, 0)]
DEPTHS = [(DISK_BYTES, 1)]


async def test_each_context_is_told_of(rig: Rig, node: Node, *, extended: bool) -> None:
    client = await rig.client("disk", BASE, DIRTY, DEPTH, extended=extended)
    status = await in_thread(lambda: client.block_status(0, DISK_BYTES))
    assert status == {0: ALLOCATION, 1: DEPTHS, 2: DIRTINESS}


async def test_a_part_of_the_disk(rig: Rig, node: Node, *, extended: bool) -> None:
    client = await rig.client("disk", BASE, DIRTY, extended=extended)
    offset, length = 3 * GRANULE, 1024
    status = await in_thread(lambda: client.block_status(offset, length))
    assert status == {0: [(512, 0), (512, 3)], 2: [(1024, 1)]}


async def test_one_run_of_each(rig: Rig, node: Node, *, extended: bool) -> None:
    client = await rig.client("disk", BASE, DEPTH, DIRTY, extended=extended)
    status = await in_thread(lambda: client.block_status(4096, DISK_BYTES // 2, CmdFlag.REQ_ONE))
    assert status == {0: [(8 * KIB, 0)], 1: [(DISK_BYTES // 2, 1)], 2: [(3 * GRANULE - 4096, 0)]}


async def test_only_the_contexts_that_are_asked_for(rig: Rig, node: Node) -> None:
    client = await rig.client("disk", BASE, DEPTH, DIRTY, extended=True)

    def converse() -> None:
        status = client.block_status(0, DISK_BYTES, contexts=[2, 0])
        assert status == {0: ALLOCATION, 2: DIRTINESS}
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)


@pytest.mark.parametrize("contexts", [[], [2, 2], [2, 7], [1], range(20_000)], ids=str)
async def test_contexts_that_can_not_be_asked_for(
    rig: Rig, node: Node, contexts: Sequence[int]
) -> None:
    client = await rig.client("disk", BASE, DIRTY, extended=True)

    def converse() -> None:
        with pytest.raises(NbdError, match="CMD_BLOCK_STATUS payload not valid") as raised:
            client.block_status(0, DISK_BYTES, contexts=contexts)
        assert raised.value.code == Errno.EINVAL
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)


async def test_a_list_of_contexts_that_is_too_long_is_no_shorter_one(
    rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what fits into the buffer of it makes a good one."""
    monkeypatch.setattr(limits, "NBD_GATHER_BYTES", 64)
    monkeypatch.setattr(limits, "NBD_RECEIVE_BUFFER_BYTES", 364)
    client = await rig.client("disk", BASE, DIRTY, extended=True)

    def converse() -> None:
        sent: list[bytes] = []
        with monkeypatch.context() as patched:
            patched.setattr(client, "send", sent.append)
            for _ in range(10):
                client.submit(Call(Cmd.READ, 0, 1))
            contexts = status_filter(DISK_BYTES, [0] * 30)
            cookie = client.submit(Call(Cmd.BLOCK_STATUS, 0, data=contexts))
        client.send(b"".join(sent))
        with pytest.raises(NbdError, match="CMD_BLOCK_STATUS payload not valid"):
            client.wait(cookie)
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (0, 0, "need non-zero length"),
        (
            DISK_BYTES - 1,
            2,
            f"operation past EOF; From: {DISK_BYTES - 1}, Len: 2, Size: {DISK_BYTES}",
        ),
    ],
)
async def test_ranges_that_are_refused(
    rig: Rig, node: Node, offset: int, length: int, message: str, *, extended: bool
) -> None:
    client = await rig.client("disk", BASE, extended=extended)

    def converse() -> None:
        with pytest.raises(NbdError) as raised:
            client.block_status(offset, length)
        assert (raised.value.code, raised.value.message) == (Errno.EINVAL, message)

    await in_thread(converse)


async def test_nothing_was_negotiated(rig: Rig, node: Node, *, extended: bool) -> None:
    client = await rig.client(extended=extended)

    def converse() -> None:
        with pytest.raises(NbdError, match="CMD_BLOCK_STATUS not negotiated"):
            client.block_status(0, DISK_BYTES)

    await in_thread(converse)


async def test_a_failure_is_told_after_what_was_found(
    rig: Rig, node: Node, driver: WatchedDriver, *, extended: bool
) -> None:
    client = await rig.client("disk", BASE, DIRTY, extended=extended)
    driver.fail("allocation", errno.EIO)

    def converse() -> None:
        with pytest.raises(NbdError, match="can't get block status") as raised:
            client.block_status(0, DISK_BYTES)
        assert raised.value.code == Errno.EIO
        assert client.block_status(0, DISK_BYTES) == {0: ALLOCATION, 2: DIRTINESS}

    await in_thread(converse)


async def test_writes_are_seen_in_the_bitmap(rig: Rig, node: Node) -> None:
    client = await rig.client("disk", DIRTY)

    def converse() -> None:
        client.write(0, b"z")
        assert client.block_status(0, 2 * GRANULE) == {2: [(GRANULE, 1), (GRANULE, 0)]}

    await in_thread(converse)


async def test_a_bitmap_is_busy_while_it_is_exported(rig: Rig, node: Node) -> None:
    bitmap = node.bitmaps.get("b")
    assert bitmap.busy
    with pytest.raises(BlockdError, match="Bitmap 'b' is currently in use by another operation"):
        rig.export(node, "again", bitmaps=[node.bitmaps.add("free", GRANULE), bitmap])
    assert not node.bitmaps.get("free").busy
    await rig.server.remove("id-disk", hard=False)
    assert not bitmap.busy


class Fragmented(WatchedDriver):
    """Every other sector is a hole; it tells of a few at a time, as a qcow2 image does."""

    def __init__(self, step: int, size_bytes: int) -> None:
        super().__init__(1)
        self.size_bytes = size_bytes
        self._step = step

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        self._count("allocation")
        end = min(offset + length, offset + self._step * 1024)
        return [
            Allocation(Extent(at, min(self._step, end - at)), zero=bool(at // self._step % 2))
            for at in range(offset, end, self._step)
        ]


@pytest.mark.parametrize("extended_", [False, True])
async def test_so_many_runs_and_no_more(rig: Rig, *, extended_: bool) -> None:
    rig.export(rig.node("disk", Fragmented(512, 1 << 40)))
    client = await rig.client("disk", BASE, extended=extended_)
    status = await in_thread(lambda: client.block_status(0, 1 << 31))
    assert status == {0: [(512, 0), (512, 3)] * (limits.NBD_STATUS_RUNS // 2)}
    one = await in_thread(lambda: client.block_status(512, 1 << 31, CmdFlag.REQ_ONE))
    assert one == {0: [(512, 3)]}


class Solid(WatchedDriver):
    """All data, one sector at a time."""

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        self._count("allocation")
        return [Allocation(Extent(offset, 512), zero=False)]


async def test_a_driver_that_tells_little_is_not_asked_forever(rig: Rig) -> None:
    driver = Solid(1)
    driver.size_bytes = 1 << 44
    rig.export(rig.node("disk", driver))
    client = await rig.client("disk", BASE, extended=True)
    status = await in_thread(lambda: client.block_status(0, 1 << 44))
    assert status == {0: [(limits.NBD_STATUS_STEPS * 512, 0)]}
    assert driver.counts["allocation"] == limits.NBD_STATUS_STEPS


def dirty_every_other(bitmap: DirtyBitmap, granules: int) -> None:
    bits = bitmap.usable_bits()
    bits.update_granules(range(0, granules, 2))


@pytest.mark.parametrize("granules", [10, 2 * limits.BITMAP_WINDOW_GRANULES + 10])
async def test_a_bitmap_of_scattered_writes(rig: Rig, granules: int) -> None:
    driver = WatchedDriver(1)
    driver.size_bytes = 1 << 44
    node = rig.node("disk", driver)
    bitmap = node.bitmaps.add("b", GRANULE)
    dirty_every_other(bitmap, granules)
    rig.export(node, bitmaps=[bitmap])
    client = await rig.client("disk", DIRTY, extended=True)
    status = await in_thread(lambda: client.block_status(0, 1 << 44))
    runs = [(GRANULE, 1), (GRANULE, 0)] * (granules // 2)
    runs[-1] = (GRANULE + (1 << 44) - granules * GRANULE, 0)
    assert status == {2: runs[: limits.NBD_STATUS_RUNS]}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize(
    ("starts", "stops"),
    [([0], [5]), ([3], [5]), ([0, 7], [5, 9]), ([2, 7, 20], [5, 9, 30])],
    ids=str,
)
def test_dirty_runs_in_bulk_are_those_one_by_one(
    starts: list[int], stops: list[int], limit: int, *, extended: bool
) -> None:
    bulk, single = (RunList(limit, extended=extended) for _ in range(2))
    bulk.add_dirty(0, starts, stops)
    at = 0
    for start, stop in zip(starts, stops, strict=True):
        single.add(start - at, 0)
        single.add(stop - start, 1)
        at = stop
    assert (bulk.runs, bulk.full) == (single.runs, single.full)
