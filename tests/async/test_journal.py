"""A node with a journal: nothing reaches the driver before the journal has noted it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import CopyOnReadDriver, Descriptor, Node, RawDriver
from blockd.errors import WouldBlock
from blockd.extent import Extent
from tests.helpers.backup_rig import Rig, pattern
from tests.helpers.fake_journal import FakeJournal
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.watched_driver import WatchedDriver

SIZE = 64 * 1024
DATA = memoryview(b"x" * 512)
GRANULARITY = 512

Change = Callable[[Node], Awaitable[object]]


def _write_nothing(_: Descriptor, end: int) -> int:
    return end


#: Every way to change a node's content that may wait; each touches 512 bytes from 1024 on.
CHANGES: dict[str, Change] = {
    "write": lambda node: node.write(1024, DATA),
    "write with FUA": lambda node: node.write(1024, DATA, fua=True),
    "write by descriptor": lambda node: node.write_by(1024, 512, _write_nothing),
    "write_zeroes": lambda node: node.write_zeroes(1024, 512, unmap=True),
    "write_zeroes with FUA": lambda node: node.write_zeroes(1024, 512, unmap=False, fua=True),
    "discard": lambda node: node.discard(1024, 512),
    "discard with FUA": lambda node: node.discard(1024, 512, fua=True),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


@pytest.fixture
def driver() -> WatchedDriver:
    driver = WatchedDriver(SIZE)
    driver.nowait = lambda _: True
    return driver


@pytest.fixture
def node(driver: WatchedDriver) -> Node:
    return Node("n", driver)


async def keep(node: Node, journal: FakeJournal | None) -> None:
    async with node.quiesced():
        node.keep_journal(journal)


@each_change
async def test_a_change_waits_for_its_note(
    node: Node, driver: WatchedDriver, change: Change
) -> None:
    bitmap = node.bitmaps.add("b", GRANULARITY)
    journal = FakeJournal()
    journal.ready = trio.Event()
    await keep(node, journal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, node)
        await wait_all_tasks_blocked()
        assert driver.seen == []
        assert bitmap.count_bytes == 0
        journal.ready.set()
    assert journal.noted == [(1024, 512)]
    assert list(bitmap.usable_bits().extents()) == [Extent(1024, 512)]


async def test_each_write_is_noted_before_the_driver_sees_it(
    node: Node, driver: WatchedDriver
) -> None:
    log: list[str] = []
    driver.on_begin = log.append
    await keep(node, FakeJournal(log))
    node.write_nowait(0, DATA)
    await node.write(512, DATA)
    await node.write_zeroes(1024, 512, unmap=True)
    await node.discard(1024, 512)
    assert log == ["note", "write", "note", "write", "note", "write_zeroes", "note", "discard"]


async def test_a_write_that_can_not_be_noted_at_once_goes_the_async_way(
    node: Node, driver: WatchedDriver
) -> None:
    journal = FakeJournal(at_once=False)
    await keep(node, journal)
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    assert driver.seen == [] == journal.noted == node.bitmaps.recent
    await node.write(0, DATA)
    assert (driver.seen, journal.noted) == (["write"], [(0, 512)])


async def test_the_instants_of_the_journal_and_of_the_bitmaps_are_the_same(node: Node) -> None:
    """Between the note and the mark nothing else happens, whatever waits for its turn."""
    journal = FakeJournal()
    bitmap = node.bitmaps.add("b", GRANULARITY)
    await keep(node, journal)
    differences: list[int] = []
    done = trio.Event()

    async def compare() -> None:
        while not done.is_set():
            marked = len({offset for offset, _ in journal.noted}) * GRANULARITY
            differences.append(marked - bitmap.count_bytes)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(compare)
        for offset in range(0, 50 * 512, 512):
            await node.write(offset, DATA)
        done.set()
    assert set(differences) == {0}


async def test_a_cancelled_wait_writes_nothing_and_blocks_nobody(
    node: Node, driver: WatchedDriver
) -> None:
    journal = FakeJournal()
    journal.ready = trio.Event()
    await keep(node, journal)
    with trio.move_on_after(0):
        await node.write(0, DATA)
    await keep(node, None)
    assert driver.seen == []


async def test_a_quiet_node_waits_for_the_writes_that_wait_for_their_notes(
    node: Node, driver: WatchedDriver
) -> None:
    journal = FakeJournal()
    journal.ready = trio.Event()
    await keep(node, journal)
    quiet = trio.Event()

    async def be_quiet() -> None:
        async with node.quiesced():
            assert driver.seen == ["write"]
            quiet.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 0, DATA)
        await wait_all_tasks_blocked()
        nursery.start_soon(be_quiet)
        await wait_all_tasks_blocked()
        assert not quiet.is_set()
        with pytest.raises(WouldBlock):
            node.write_nowait(0, DATA)
        journal.ready.set()
    assert quiet.is_set()


async def test_hooks_come_after_the_note(node: Node, driver: WatchedDriver) -> None:
    log: list[str] = []

    class Hook:
        def before_write_nowait(self, offset: int, length: int) -> bool:
            log.append("hook")
            return True

        async def before_write(self, offset: int, length: int) -> None:
            log.append("hook")

    driver.on_begin = log.append
    async with node.quiesced():
        node.add_hook(Hook())
        node.keep_journal(FakeJournal(log))
    node.write_nowait(0, DATA)
    await node.write(0, DATA)
    assert log == ["note", "hook", "write"] * 2


async def test_a_journal_comes_and_goes_only_while_quiesced(node: Node) -> None:
    with pytest.raises(AssertionError):
        node.keep_journal(FakeJournal())
    assert node.journal is None


async def test_without_a_journal_an_inline_write_is_the_drivers_own(
    node: Node, driver: WatchedDriver
) -> None:
    await keep(node, FakeJournal())
    assert node.write_nowait != driver.write_nowait
    await keep(node, None)
    assert node.write_nowait == driver.write_nowait


async def test_ignored_discards_and_refused_writes_are_not_noted(
    node: Node, driver: WatchedDriver
) -> None:
    journal = FakeJournal()
    await keep(node, journal)
    driver.ignores_discards = True
    await node.discard(0, 512)
    async with node.quiesced():
        await node.make_read_only()
    with pytest.raises(PermissionError):
        await node.write(0, DATA)
    with pytest.raises(WouldBlock):
        node.write_nowait(0, DATA)
    assert journal.noted == []


async def test_what_is_copied_on_a_read_is_noted_where_it_is_written() -> None:
    overlay = Node("overlay", MemoryOverlay(SIZE, Node("backing", MemoryDriver(SIZE))))
    journal = FakeJournal()
    await keep(overlay, journal)
    top = Node("top", CopyOnReadDriver(overlay))
    await top.read(4096, memoryview(bytearray(512)))
    assert journal.noted
    assert all(offset <= 4096 < offset + length for offset, length in journal.noted)


async def test_what_reaches_a_node_from_above_is_noted_there(
    node: Node, driver: WatchedDriver
) -> None:
    journal = FakeJournal()
    above = Node("above", RawDriver(node, offset_bytes=4096))
    write = above.write_nowait
    await keep(node, journal)
    write(0, DATA)
    await above.write(512, DATA)
    assert journal.noted == [(4096, 512), (4608, 512)]


async def test_a_backup_is_noted_by_its_target() -> None:
    content = pattern(16)
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery, MemoryDriver(content), MemoryDriver(len(content)))
        journal = FakeJournal()
        await keep(rig.target, journal)
        job = rig.job()
        await rig.start(job)
        await job.wait_concluded()
    assert rig.target_driver.data == content
    noted = {at for offset, length in journal.noted for at in range(offset, offset + length, 1024)}
    assert noted == set(range(0, len(content), 1024))
