"""``raw``: a window on the node below, and the same marks, gates and errors there."""

from __future__ import annotations

import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Allocation, Descriptor, Node
from blockd.block.drivers.raw import RawDriver
from blockd.errors import BlockdError, WouldBlock
from blockd.extent import Extent
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.watched_driver import WatchedDriver

SIZE = 1024 * 1024
DATA = memoryview(b"x" * 512)


@pytest.fixture
def driver() -> WatchedDriver:
    driver = WatchedDriver(SIZE)
    driver.filename = "/disk.img"
    driver.nowait = lambda _: True
    return driver


@pytest.fixture
def child(driver: WatchedDriver) -> Node:
    return Node("child", driver)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, None, SIZE),
        (0, SIZE, SIZE),
        (512, None, SIZE - 512),
        (SIZE, None, 0),
        (SIZE, 0, 0),
        (100, 1024, 1024),
    ],
)
def test_a_window_has_its_size(child: Node, offset: int, size: int | None, expected: int) -> None:
    raw = RawDriver(child, offset_bytes=offset, size_bytes=size)
    assert raw.size_bytes == expected


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (
            SIZE + 1,
            None,
            "Offset (1048577) cannot be greater than size of the containing file (1048576)",
        ),
        (
            512,
            SIZE,
            "The sum of offset (512) and size (1048576) has to be smaller or equal to the  "
            "actual size of the containing file (1048576)",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_refused_as_by_the_peer(
    child: Node, offset: int, size: int | None, message: str
) -> None:
    with pytest.raises(BlockdError) as raised:
        RawDriver(child, offset_bytes=offset, size_bytes=size)
    assert raised.value.message == message


async def test_everything_passes_the_node_below(child: Node, driver: WatchedDriver) -> None:
    bitmap = child.bitmaps.add("b", 512)
    node = Node("top", RawDriver(child, offset_bytes=1024))
    await node.write(0, DATA)
    node.write_nowait(1024, DATA)
    await node.write_zeroes(2048, 512, unmap=True)
    await node.discard(3072, 512)
    assert driver.data[1024:1536] == DATA
    assert driver.data[2048:2560] == DATA
    marked = [extent.offset for extent in bitmap.usable_bits().extents()]
    assert marked == [1024, 2048, 3072, 4096]
    async with child.quiesced():
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)


async def test_a_bitmap_above_marks_in_its_own_window(child: Node) -> None:
    node = Node("top", RawDriver(child, offset_bytes=1024))
    bitmap = node.bitmaps.add("b", 512)
    await node.write(0, DATA)
    assert list(bitmap.usable_bits().extents()) == [Extent(0, 512)]


async def test_a_write_by_a_thread_is_one_of_the_child_too(child: Node) -> None:
    """Its bitmaps and views must know of it, though the thread has a descriptor."""
    bitmap = child.bitmaps.add("b", 512)
    node = Node("top", RawDriver(child, offset_bytes=1024))
    written, quiet = threading.Event(), trio.Event()

    async def quiesce() -> None:
        async with child.quiesced():
            quiet.set()

    def write(_: Descriptor, end: int) -> int:
        written.wait()
        return end

    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write_by, 0, 512, write)
        await wait_all_tasks_blocked()
        nursery.start_soon(quiesce)
        await wait_all_tasks_blocked()
        was_quiet = quiet.is_set()
        written.set()
    assert not was_quiet
    assert list(bitmap.usable_bits().extents()) == [Extent(1024, 512)]


async def test_discards_end_where_they_are_not_wanted(child: Node, driver: WatchedDriver) -> None:
    node = Node("top", RawDriver(child, unmap=False))
    bitmap = node.bitmaps.add("b", 512)
    await node.discard(0, 512)
    assert driver.seen == []
    assert not bitmap.count_bytes
    await node.discard(0, 512, fua=True)
    assert driver.seen == ["flush"]


async def test_layers_are_counted_from_the_child(child: Node) -> None:
    window = RawDriver(Node("overlay", MemoryOverlay(SIZE, child)), offset_bytes=1024)
    assert await window.allocation(512, 512) == [Allocation(Extent(512, 512), zero=True, depth=2)]


async def test_a_read_only_node_below_is_not_written() -> None:
    driver = WatchedDriver(SIZE, read_only=True)
    driver.filename = "/disk.img"
    node = Node("top", RawDriver(Node("child", driver)))
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    with pytest.raises(PermissionError):
        await node.write(0, DATA)
    assert driver.seen == []


def test_names_are_the_peers(child: Node) -> None:
    plain = RawDriver(child)
    assert plain.filename == "/disk.img"
    window = RawDriver(child, offset_bytes=512)
    assert window.filename == (
        'json:{"offset": 512, "driver": "raw", '
        '"file": {"driver": "memory", "filename": "/disk.img"}}'
    )
    above = RawDriver(Node("above", plain))
    assert above.filename == (
        'json:{"driver": "raw", "file": {"driver": "raw", '
        '"file": {"driver": "memory", "filename": "/disk.img"}}}'
    )
