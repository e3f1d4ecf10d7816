"""``copy-before-write`` and ``snapshot-access``: an instant that stays, whatever is written."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.backup import CopyBeforeWriteDriver, Keeping, SnapshotAccessDriver
from blockd.block import Graph, Node, Role
from blockd.errors import BlockdError
from tests.helpers.backup_rig import CLUSTER, pattern, use_small_limits
from tests.helpers.memory_driver import MemoryDriver

CLUSTERS = 16
OLD = pattern(CLUSTERS)
SNAPSHOT = Keeping(breaks_writes=False)


class Stack:
    """A disk and a target in memory, the filter, and the snapshot. A guest writes to the disk."""

    def __init__(self, tasks: trio.Nursery) -> None:
        self.graph = Graph(tasks)
        self.disk_driver = MemoryDriver(OLD)
        self.target_driver = MemoryDriver(len(OLD))
        self.disk = self.graph.add("disk", self.disk_driver, owned=True)
        self.target = self.graph.add("target", self.target_driver, owned=True)

    async def keep(self, keeping: Keeping | None = None) -> None:
        driver = await CopyBeforeWriteDriver.open(
            self.graph,
            "node 'filter'",
            self.disk,
            self.target,
            keeping or Keeping(),
            read_only=False,
        )
        try:
            self.filter = self.graph.add("filter", driver, owned=True)
        except BlockdError:
            await driver.close()
            raise
        access = SnapshotAccessDriver(self.filter, read_only=False, unmap=True)
        self.snapshot = self.graph.add("snapshot", access, owned=True)

    async def snapshot_read(self, offset: int = 0, length: int = len(OLD)) -> bytes:
        return await read(self.snapshot, offset, length)

    async def copied(self) -> list[int]:
        starts = range(0, len(OLD), CLUSTER)
        data = self.target_driver.data
        return [at // CLUSTER for at in starts if data[at : at + CLUSTER] == OLD[at : at + CLUSTER]]


async def read(node: Node, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    await node.read(offset, view)
    return bytes(view)


@pytest.fixture
async def stack(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    use_small_limits(monkeypatch)
    async with trio.open_nursery() as tasks:
        stack = Stack(tasks)
        yield stack
        await stack.graph.close()
        assert not stack.disk._hooks


async def test_the_snapshot_stays_and_each_cluster_is_copied_once(stack: Stack) -> None:
    await stack.keep()
    for through in (stack.filter, stack.disk):
        await through.write(3 * CLUSTER + 5, memoryview(b"new"))
        await through.write_zeroes(7 * CLUSTER - 1, 2, unmap=True)
        await through.discard(9 * CLUSTER, CLUSTER)
    assert await stack.snapshot_read() == OLD
    assert await read(stack.filter, 3 * CLUSTER + 5, 3) == b"new"
    assert await stack.copied() == [3, 6, 7, 9]
    assert stack.target_driver.counts["write"] == 3  # 6 and 7 are copied in one


async def test_what_is_safe_already_is_written_at_once(stack: Stack) -> None:
    await stack.keep()
    stack.disk_driver.nowait = lambda _: True
    await stack.filter.write(0, memoryview(b"a"))
    stack.filter.write_nowait(1, memoryview(b"b"))
    assert bytes(stack.disk_driver.data[:2]) == b"ab"
    assert await stack.snapshot_read() == OLD


async def test_zeroes_are_kept_as_zeroes(stack: Stack) -> None:
    await stack.disk.write_zeroes(0, CLUSTER, unmap=True)
    await stack.target.write(0, memoryview(b"dirt"))
    await stack.keep()
    await stack.filter.write(0, memoryview(b"new"))
    assert stack.target_driver.counts["write_zeroes"] == 1
    assert await stack.snapshot_read() == bytes(CLUSTER) + OLD[CLUSTER:]


async def test_a_reader_that_is_overtaken_by_a_write_reads_again(stack: Stack) -> None:
    await stack.keep()
    with stack.disk_driver.hold("read") as hold:
        async with trio.open_nursery() as nursery:
            seen: list[bytes] = []

            async def reader() -> None:
                seen.append(await stack.snapshot_read())

            nursery.start_soon(reader)
            await hold.reached.wait()
            nursery.start_soon(stack.filter.write, 0, memoryview(b"new"))
            await wait_all_tasks_blocked()
            assert bytes(stack.disk_driver.data[:3]) == OLD[:3]
            hold.release()
    assert seen == [OLD]


async def test_only_what_the_bitmap_names_is_kept(stack: Stack) -> None:
    bitmap = stack.disk.bitmaps.add("b", CLUSTER)
    await stack.disk.write(2 * CLUSTER, memoryview(OLD[2 * CLUSTER : 4 * CLUSTER]))
    await stack.keep(Keeping(bitmap))
    stack.disk.bitmaps.remove("b")
    await stack.filter.write(0, memoryview(b"n" * len(OLD)))
    assert await stack.copied() == [2, 3]
    kept = slice(2 * CLUSTER, 4 * CLUSTER)
    assert await stack.snapshot_read(2 * CLUSTER, 2 * CLUSTER) == OLD[kept]
    for offset in (2 * CLUSTER - 1, 3 * CLUSTER + 1):
        with pytest.raises(PermissionError):
            await stack.snapshot_read(offset, CLUSTER)


async def test_what_the_reader_gives_up_is_not_kept(stack: Stack) -> None:
    await stack.keep()
    await stack.filter.write(4 * CLUSTER, memoryview(b"new"))
    await stack.snapshot.discard(4 * CLUSTER - 1, 3 * CLUSTER)
    assert await stack.copied() == []
    await stack.filter.write(5 * CLUSTER, memoryview(b"new"))
    assert await stack.copied() == []
    for cluster in (4, 5):
        with pytest.raises(PermissionError):
            await stack.snapshot_read(cluster * CLUSTER, 1)
    assert await stack.snapshot_read(0, 4 * CLUSTER) == OLD[: 4 * CLUSTER]
    assert await stack.snapshot_read(6 * CLUSTER, CLUSTER) == OLD[6 * CLUSTER : 7 * CLUSTER]


async def test_nobody_writes_to_the_snapshot(stack: Stack) -> None:
    await stack.keep()
    with pytest.raises(OSError, match="not supported"):
        await stack.snapshot.write(0, memoryview(b"x"))
    with pytest.raises(OSError, match="not supported"):
        await stack.snapshot.write_zeroes(0, 1, unmap=True)
    await stack.snapshot.flush()


# -- trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "operation"), [("target", "write"), ("disk", "read")])
async def test_a_failed_copy_fails_the_write(stack: Stack, side: str, operation: str) -> None:
    await stack.keep()
    driver = stack.target_driver if side == "target" else stack.disk_driver
    driver.fail(operation, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        await stack.filter.write(0, memoryview(b"new"))
    assert await stack.snapshot_read() == OLD
    assert bytes(stack.disk_driver.data) == OLD
    await stack.filter.write(0, memoryview(b"new"))
    assert await stack.snapshot_read() == OLD


async def test_a_failed_copy_ends_the_snapshot(stack: Stack) -> None:
    await stack.keep(SNAPSHOT)
    stack.target_driver.fail("write", errno.ENOSPC, times=99)
    await stack.filter.write(0, memoryview(b"new"))
    assert bytes(stack.disk_driver.data[:3]) == b"new"
    for offset in (0, 5 * CLUSTER):
        with pytest.raises(PermissionError):
            await stack.snapshot_read(offset, 1)
        with pytest.raises(PermissionError):
            await stack.snapshot.allocation(offset, 1)
    await stack.filter.write(5 * CLUSTER, memoryview(b"new"))
    assert stack.target_driver.counts["write"] == 1


async def test_a_snapshot_that_ends_during_a_read_fails_it(stack: Stack) -> None:
    await stack.keep(SNAPSHOT)
    stack.target_driver.fail("write", errno.EIO)
    turns = itertools.chain([50], itertools.repeat(0))
    stack.disk_driver.delay = lambda _: next(turns)
    async with trio.open_nursery() as nursery:

        async def reader() -> None:
            with pytest.raises(PermissionError):
                await stack.snapshot_read(0, CLUSTER)
            assert bytes(stack.disk_driver.data[:3]) == b"new"

        nursery.start_soon(reader)
        while not stack.disk_driver.counts["read"]:
            await trio.lowlevel.checkpoint()
        await stack.filter.write(0, memoryview(b"new"))
        assert not stack.disk_driver.reads[1:]


@pytest.mark.parametrize("keeping", [Keeping(timeout_seconds=3), SNAPSHOT])
async def test_no_write_waits_for_a_target_that_hangs(
    stack: Stack, keeping: Keeping, autojump_clock: MockClock
) -> None:
    await stack.keep(keeping)
    stack.target_driver.stubborn = True
    with stack.target_driver.hold("write") as hold:
        began = trio.current_time()
        if keeping.breaks_writes:
            with pytest.raises(TimeoutError):
                await stack.filter.write(0, memoryview(b"new"))
            assert trio.current_time() - began == keeping.timeout_seconds
            assert bytes(stack.disk_driver.data) == OLD
        else:
            await stack.filter.write(0, memoryview(b"new"))
            assert trio.current_time() - began == limits.GUEST_WAIT_FOR_COPY_SECONDS
        hold.release()
    if keeping.breaks_writes:
        await stack.filter.write(0, memoryview(b"new"))
        assert stack.target_driver.counts["write"] == 1
        assert await stack.snapshot_read() == OLD


async def test_copies_that_hang_take_bounded_memory(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(limits, "CBW_COPIES", 2)
    await stack.keep(Keeping(timeout_seconds=1))
    with stack.target_driver.hold("write"):
        for cluster in range(4):
            with pytest.raises(TimeoutError):
                await stack.filter.write(cluster * CLUSTER, memoryview(b"new"))
        assert stack.disk_driver.counts["read"] == 2
    await wait_all_tasks_blocked()
    await stack.filter.write(0, memoryview(b"n" * len(OLD)))
    assert await stack.snapshot_read() == OLD


async def test_a_guest_that_leaves_breaks_nothing(stack: Stack) -> None:
    await stack.keep()
    with stack.target_driver.hold("write") as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stack.filter.write, 0, memoryview(b"new"))
            await hold.reached.wait()
            nursery.cancel_scope.cancel()
    assert bytes(stack.disk_driver.data) == OLD
    await stack.filter.write(0, memoryview(b"new"))
    assert await stack.snapshot_read() == OLD


async def test_taken_out_while_a_guest_waits(stack: Stack) -> None:
    await stack.keep()
    async with trio.open_nursery() as nursery:
        with stack.target_driver.hold("write") as hold:
            nursery.start_soon(stack.disk.write, 0, memoryview(b"new"))
            await hold.reached.wait()
            await stack.graph.remove(stack.snapshot)
            nursery.start_soon(stack.graph.remove, stack.filter)
            await wait_all_tasks_blocked()
            assert bytes(stack.disk_driver.data[:3]) == b"new"
            assert stack.target.users
    assert not stack.target.users
    assert not stack.disk.users


# -- who may use what ------------------------------------------------------------------------------


async def test_a_target_that_can_not_be_one(stack: Stack) -> None:
    small = stack.graph.add("small", MemoryDriver(CLUSTER), owned=True)
    locked = stack.graph.add("locked", MemoryDriver(OLD, read_only=True), owned=True)
    refusals = {
        stack.disk: "cannot be the same",
        small: "Target 'small' is smaller than 'disk'",
        locked: "Block node is read-only",
    }
    target = stack.target
    for stack.target, words in refusals.items():
        with pytest.raises(BlockdError, match=words):
            await stack.keep()
        assert not stack.disk.users
        assert not stack.disk._hooks
    stack.target = target


async def test_who_else_may_write(stack: Stack) -> None:
    await stack.keep()
    for node in (stack.disk, stack.filter, stack.snapshot, stack.target):
        stack.graph.hold(node, "an unnamed block device", writes=True).release()
    guest = stack.graph.hold(stack.filter, "an unnamed block device", writes=True)
    stack.graph.hold(stack.snapshot, "a job", Role.SOURCE, writes=False, alone=True).release()
    guest.release()


async def test_its_size_stays(stack: Stack) -> None:
    await stack.keep()
    for node in (stack.disk, stack.filter, stack.snapshot, stack.target):
        with pytest.raises(BlockdError):
            await stack.graph.resize(node, 2 * len(OLD))


async def test_only_over_such_a_filter(stack: Stack) -> None:
    with pytest.raises(BlockdError, match="Node 'disk' is no 'copy-before-write' filter"):
        SnapshotAccessDriver(stack.disk, read_only=True, unmap=False)
