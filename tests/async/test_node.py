"""A node: what comes before every write, which path a write takes, and the quiet instant."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.bitmap import DirtyBitmap
from blockd.block import Node
from blockd.errors import WouldBlock
from blockd.extent import Extent
from tests.helpers.watched_driver import WatchedDriver

SIZE = 64 * 1024
DATA = memoryview(b"x" * 512)
BITMAP_GRANULARITY = 512

AsyncWrite = Callable[[Node], Awaitable[None]]

#: Every way to change a node's content; each touches 512 bytes from 1024 on.
CHANGES: dict[str, AsyncWrite] = {
    "write": lambda node: node.write(1024, DATA),
    "write with FUA": lambda node: node.write(1024, DATA, fua=True),
    "write_zeroes": lambda node: node.write_zeroes(1024, 512, unmap=True),
    "write_zeroes with FUA": lambda node: node.write_zeroes(1024, 512, unmap=False, fua=True),
    "discard": lambda node: node.discard(1024, 512),
    "discard with FUA": lambda node: node.discard(1024, 512, fua=True),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


class Hook:
    """A point-in-time view that logs; ``safe`` is what it says to a write that can't wait."""

    def __init__(self, log: list[str], name: str = "hook", *, safe: bool = True) -> None:
        self.log = log
        self.name = name
        self.safe = safe
        self.held = trio.Event()
        self.held.set()

    def before_write_nowait(self, offset: int, length: int) -> bool:
        self.log.append(f"{self.name} nowait {offset}+{length}")
        return self.safe

    async def before_write(self, offset: int, length: int) -> None:
        self.log.append(f"{self.name} {offset}+{length}")
        await self.held.wait()


@pytest.fixture
def driver() -> WatchedDriver:
    driver = WatchedDriver(SIZE)
    driver.nowait = lambda _: True
    return driver


@pytest.fixture
def node(driver: WatchedDriver) -> Node:
    return Node("n", driver)


@pytest.fixture
def bitmap(node: Node) -> DirtyBitmap:
    return node.bitmaps.add("b", BITMAP_GRANULARITY)


def dirty(bitmap: DirtyBitmap) -> list[Extent]:
    return list(bitmap.usable_bits().extents())


async def hook_in(node: Node, hook: Hook) -> None:
    async with node.quiesced():
        node.add_hook(hook)


# --- marking ----------------------------------------------------------------------------------


@each_change
async def test_a_change_is_noted_before_the_driver_sees_it(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap, change: AsyncWrite
) -> None:
    noted: list[list[tuple[int, int]]] = []
    driver.on_begin = lambda _: noted.append(list(node.bitmaps.recent))
    await change(node)
    assert noted
    assert all(recent == [(1024, 512)] for recent in noted)
    assert dirty(bitmap) == [Extent(1024, 512)]


async def test_an_inline_write_is_noted_before_the_driver_sees_it(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    noted: list[list[tuple[int, int]]] = []
    driver.on_begin = lambda _: noted.append(list(node.bitmaps.recent))
    node.write_nowait(1024, DATA)
    assert noted == [[(1024, 512)]]
    assert dirty(bitmap) == [Extent(1024, 512)]


@each_change
async def test_a_change_that_fails_is_marked_and_its_error_raised(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap, change: AsyncWrite
) -> None:
    for operation in ("write", "write_zeroes", "discard"):
        driver.fail(operation, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as raised:
        await change(node)
    assert raised.value.errno == errno.EIO
    assert dirty(bitmap) == [Extent(1024, 512)]
    async with node.quiesced():
        assert driver.counts["flush"] == 0


async def test_an_inline_write_that_fails_is_marked_and_its_error_raised(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    driver.fail("write", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        node.write_nowait(1024, DATA)
    assert dirty(bitmap) == [Extent(1024, 512)]


async def test_recent_writes_are_folded_at_their_limit(
    node: Node, bitmap: DirtyBitmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECENT_WRITES_LIMIT", 3)
    for offset in (0, 1024):
        node.write_nowait(offset, DATA)
    assert len(node.bitmaps.recent) == 2
    await node.write(2048, DATA)
    assert node.bitmaps.recent == []
    assert dirty(bitmap) == [Extent(0, 512), Extent(1024, 512), Extent(2048, 512)]


async def test_recent_writes_stay_bounded_without_any_bitmap(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECENT_WRITES_LIMIT", 3)
    for _ in range(10):
        await node.write(0, DATA)
        assert len(node.bitmaps.recent) < 3


# --- reading and flushing ---------------------------------------------------------------------


async def test_reads_and_flushes_pass_while_quiesced(node: Node, driver: WatchedDriver) -> None:
    driver.data[0:4] = b"data"
    view = memoryview(bytearray(4))
    async with node.quiesced():
        node.read_nowait(0, view)
        assert bytes(view) == b"data"
        await node.read(0, view)
        await node.flush()
        assert await node.allocation(0, 512)


async def test_a_flush_that_fails_is_raised_by_a_write_with_fua(
    node: Node, driver: WatchedDriver
) -> None:
    driver.fail("flush", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await node.write(0, DATA, fua=True)
    async with node.quiesced():
        pass


async def test_fua_flushes_after_the_change(node: Node, driver: WatchedDriver) -> None:
    await node.write(0, DATA, fua=True)
    await node.write_zeroes(0, 512, unmap=True, fua=True)
    await node.discard(0, 512, fua=True)
    assert driver.seen == ["write", "flush", "write_zeroes", "flush", "discard", "flush"]


# --- a read-only node -------------------------------------------------------------------------


@each_change
async def test_a_read_only_node_is_not_written(change: AsyncWrite) -> None:
    driver = WatchedDriver(SIZE, read_only=True)
    driver.nowait = lambda _: True
    node = Node("ro", driver)
    with pytest.raises(PermissionError) as raised:
        await change(node)
    assert raised.value.errno == errno.EPERM
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    assert driver.seen == []
    assert node.bitmaps.recent == []
    async with node.quiesced():
        pass


@each_change
async def test_a_write_that_waits_while_a_node_becomes_read_only(
    change: AsyncWrite, node: Node, driver: WatchedDriver
) -> None:
    async def refused() -> None:
        with pytest.raises(PermissionError):
            await change(node)

    async with trio.open_nursery() as nursery, node.quiesced():
        nursery.start_soon(refused)
        await wait_all_tasks_blocked()
        await node.make_read_only()
    assert driver.seen == ["flush"]


# --- which path a write takes -----------------------------------------------------------------


async def test_an_inline_write_is_the_drivers_own_while_nothing_records(
    node: Node, driver: WatchedDriver
) -> None:
    assert node.write_nowait == driver.write_nowait
    bitmap = node.bitmaps.add("b", BITMAP_GRANULARITY)
    assert node.write_nowait != driver.write_nowait
    bitmap.disable()
    assert node.write_nowait == driver.write_nowait
    bitmap.enable()
    node.write_nowait(0, DATA)
    assert dirty(bitmap) == [Extent(0, 512)]
    node.bitmaps.remove("b")
    assert node.write_nowait == driver.write_nowait


async def test_a_frozen_bitmap_whose_successor_records_keeps_inline_writes_noted(
    node: Node, bitmap: DirtyBitmap
) -> None:
    freeze = bitmap.freeze("job")
    node.write_nowait(1024, DATA)
    freeze.abdicate()
    assert dirty(bitmap) == [Extent(1024, 512)]


async def test_an_inline_write_is_refused_while_quiesced(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    async with node.quiesced():
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
        async with node.quiesced():
            pass
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
        bitmap.disable()
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
    assert driver.seen == []
    node.write_nowait(0, DATA)
    assert driver.seen == ["write"]


async def test_a_write_that_is_refused_leaves_nothing_behind(node: Node) -> None:
    view = memoryview(bytearray(10))
    kept = weakref.ref(view)
    async with node.quiesced():
        with suppress(WouldBlock):
            node.write_nowait(0, view)
    await hook_in(node, Hook([], safe=False))
    with suppress(WouldBlock):
        node.write_nowait(0, view)
    del view
    assert kept() is None


async def test_a_write_that_the_driver_can_not_do_inline_stays_to_be_done(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    driver.nowait = lambda _: False
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    with pytest.raises(WouldBlock):
        node.read_nowait(0, memoryview(bytearray(4)))
    assert driver.seen == []


# --- hooks ------------------------------------------------------------------------------------


async def test_hooks_are_asked_in_order_before_the_driver(
    node: Node, driver: WatchedDriver
) -> None:
    log: list[str] = []
    driver.on_begin = log.append
    await hook_in(node, Hook(log, "one"))
    await hook_in(node, Hook(log, "two"))
    assert node._hooks
    await node.write(1024, DATA)
    node.write_nowait(512, DATA)
    assert log == [
        *["one 1024+512", "two 1024+512", "write"],
        *["one nowait 512+512", "two nowait 512+512", "write"],
    ]


@each_change
async def test_a_hook_holds_back_every_kind_of_change(
    node: Node, driver: WatchedDriver, change: AsyncWrite
) -> None:
    hook = Hook([])
    hook.held = trio.Event()
    await hook_in(node, hook)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, node)
        await wait_all_tasks_blocked()
        assert hook.log == ["hook 1024+512"]
        assert driver.seen == []
        hook.held.set()
    assert driver.seen


async def test_an_inline_write_that_a_hook_refuses_changes_nothing(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    log: list[str] = []
    await hook_in(node, Hook(log, "one"))
    await hook_in(node, Hook(log, "two", safe=False))
    await hook_in(node, Hook(log, "three"))
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    assert driver.seen == []
    assert log == ["one nowait 0+512", "two nowait 0+512"]


async def test_a_hook_that_is_removed_is_asked_no_more(
    node: Node, driver: WatchedDriver, bitmap: DirtyBitmap
) -> None:
    log: list[str] = []
    first, second = Hook(log, "one"), Hook(log, "two")
    await hook_in(node, first)
    await hook_in(node, second)
    async with node.quiesced():
        node.remove_hook(first)
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
    node.write_nowait(0, DATA)
    assert log == ["two nowait 0+512"]
    async with node.quiesced():
        node.remove_hook(second)
    assert not node._hooks
    node.write_nowait(0, DATA)
    assert log == ["two nowait 0+512"]
    assert dirty(bitmap) == [Extent(0, 512)]


async def test_a_hook_comes_only_while_quiesced(node: Node) -> None:
    with pytest.raises(AssertionError):
        node.add_hook(Hook([]))
    assert not node._hooks


async def test_a_hook_that_has_given_up_may_go_at_any_time(
    node: Node, driver: WatchedDriver
) -> None:
    hook = Hook([])
    hook.held = trio.Event()
    await hook_in(node, hook)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 0, DATA)
        await wait_all_tasks_blocked()
        node.remove_hook(hook)
        assert node.write_nowait == driver.write_nowait
        # The write that asked it before still waits for its answer.
        await wait_all_tasks_blocked()
        assert driver.seen == []
        hook.held.set()
    assert driver.seen == ["write"]


# --- a watch on how far writes go -------------------------------------------------------------


@pytest.mark.parametrize("prepare", ["plain", "bitmap", "hook", "waiting"])
async def test_a_write_past_the_threshold_is_told_once(
    node: Node, driver: WatchedDriver, prepare: str
) -> None:
    driver.nowait = lambda _: prepare != "waiting"
    if prepare == "bitmap":
        node.bitmaps.add("b", BITMAP_GRANULARITY)
    if prepare == "hook":
        async with node.quiesced():
            node.add_hook(Hook([]))
    told: list[int] = []
    node.write_threshold.watch(1024, told.append)
    write = node.write_nowait  # as a burst does, which looks it up once
    for offset in (0, 512, 513, 514):
        with suppress(WouldBlock):
            write(offset, DATA)
        await node.write(offset, DATA)
        assert told == ([1] if offset > 512 else [])
    assert node.write_threshold.offset_bytes == 0
    if prepare == "plain":
        assert node.write_nowait == driver.write_nowait


async def test_no_discard_is_watched(node: Node) -> None:
    told: list[int] = []
    node.write_threshold.watch(1, told.append)
    await node.discard(0, 512)
    assert not told
    await node.write_zeroes(0, 512, unmap=True)
    assert told == [511]


async def test_a_watch_leaves_the_gate_shut(node: Node) -> None:
    async with node.quiesced():
        node.write_threshold.watch(1, lambda _: None)
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
        assert node.write_threshold.offset_bytes == 1
