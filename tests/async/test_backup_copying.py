"""A backup from memory to memory, and what a guest notices of it."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.backup import BitmapMode, Sync
from blockd.backup.held import HeldStore
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, open_rig
from tests.helpers.memory_driver import MemoryDriver

pytestmark = pytest.mark.usefixtures("small_backup_limits")


async def test_a_full_backup(source: MemoryDriver, target: MemoryDriver) -> None:
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
    assert target.data == OLD
    assert target.durable == OLD
    assert end["len"] == end["offset"] == 21 * CLUSTER


async def test_an_incremental_backup_copies_what_the_bitmap_names(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(5 * CLUSTER + 100, memoryview(b"new"))
        await rig.source.write(SIZE - 3, memoryview(b"end"))
        job = rig.job(Sync.INCREMENTAL, "b")
        await rig.start(job)
        await rig.source.write(0, memoryview(b"later"))
        assert await rig.finish(job) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
        assert rig.dirty_bytes(bitmap) == set(range(CLUSTER))
    expected = bytearray(SIZE)
    expected[5 * CLUSTER : 6 * CLUSTER] = source.data[5 * CLUSTER : 6 * CLUSTER]
    expected[20 * CLUSTER :] = source.data[20 * CLUSTER :]
    assert target.data == expected
    assert end["len"] == end["offset"] == 2 * CLUSTER


async def test_a_bitmap_finer_than_the_clusters_is_counted_on_the_way(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        rig.add_bitmap(granularity_bytes=512)
        await rig.source.write(5 * CLUSTER + 600, memoryview(b"new"))
        await rig.source.write(7 * CLUSTER + 600, memoryview(b"new"))
        assert await rig.copy(Sync.BITMAP, "b", BitmapMode.ALWAYS) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
    assert end["len"] == end["offset"] == 2 * CLUSTER


async def test_nothing_to_copy(source: MemoryDriver, target: MemoryDriver) -> None:
    async with open_rig(source, target) as rig:
        rig.add_bitmap()
        assert await rig.copy(Sync.INCREMENTAL, "b") is None
    assert target.data == bytes(SIZE)


async def test_the_source_and_the_target_are_not_read_where_they_are_zero() -> None:
    old = bytearray(OLD)
    old[4 * CLUSTER : 16 * CLUSTER] = bytes(12 * CLUSTER)
    source, target = MemoryDriver(old), MemoryDriver(SIZE)
    target.data[6 * CLUSTER : 7 * CLUSTER] = b"x" * CLUSTER
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
    assert target.data == old
    assert end["offset"] == 21 * CLUSTER
    # 9 clusters of data, by 4; and one cluster of the target was not zero yet.
    assert source.counts["read"] == 3
    assert target.counts["write"] == 3
    assert target.counts["write_zeroes"] == 1


async def test_the_target_is_durable_before_the_bitmap_forgets(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        flush = target.hold("flush")
        job = rig.job(Sync.INCREMENTAL, "b")
        await rig.start(job)
        await flush.reached.wait()
        await wait_all_tasks_blocked()
        assert bitmap.busy
        assert bitmap.count_bytes == CLUSTER
        flush.release()
        assert await rig.finish(job) is None
        assert bitmap.count_bytes == 0


# -- guests that write meanwhile ---------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
async def test_a_slow_target_does_not_slow_the_guest(
    source: MemoryDriver, target: MemoryDriver, *, inline: bool, autojump_clock: MockClock
) -> None:
    source.nowait = lambda _: inline
    writes = target.hold("write")
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=1)
        before = await rig.start(job)
        await writes.reached.wait()
        began = trio.current_time()
        for cluster in (9, 12, 20, 9):
            await rig.source.write(cluster * CLUSTER + 10, memoryview(b"new"))
        assert trio.current_time() == began
        assert source.data != before
        writes.release()
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.data == before


async def test_the_inline_path_saves_old_data_at_once(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    source.nowait = lambda _: True
    writes = target.hold("write")
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL)
        before = await rig.start(job)
        # Without an await: no worker has taken anything yet.
        rig.source.write_nowait(19 * CLUSTER, memoryview(b"n" * (CLUSTER + 512)))
        rig.source.write_nowait(19 * CLUSTER, memoryview(b"m" * CLUSTER))
        writes.release()
        assert await rig.finish(job) is None
    assert target.data == before


async def test_a_guest_write_over_what_is_not_wanted_passes(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        reads = source.hold("read")
        job = rig.job(Sync.INCREMENTAL, "b")
        await rig.start(job)
        for _ in range(2):
            rig.source.write_nowait(7 * CLUSTER, memoryview(b"new"))
        reads.release()
        assert await rig.finish(job) is None
    assert target.counts["write"] == 1


async def test_a_guest_write_waits_for_a_worker_that_reads_its_cluster(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    reads = source.hold("read")
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        job = rig.job(Sync.FULL)
        before = await rig.start(job)
        await reads.reached.wait()
        guests.start_soon(rig.source.write, 0, memoryview(b"new"))
        await wait_all_tasks_blocked()
        assert source.data == before
        reads.release()
        assert await rig.finish(job) is None
    assert target.data == before
    assert source.data[:3] == b"new"


@pytest.mark.parametrize("operation", ["write_zeroes", "discard"])
async def test_zeroing_much_of_the_disk_keeps_its_holes_without_reading(operation: str) -> None:
    old = bytearray(200 * CLUSTER)
    old[50 * CLUSTER : 52 * CLUSTER] = b"x" * (2 * CLUSTER)
    source, target = MemoryDriver(old), MemoryDriver(b"y" * len(old))
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=1)
        before = await rig.start(job)
        reads = source.counts["read"]
        if operation == "discard":
            await rig.source.discard(0, len(old))
        else:
            await rig.source.write_zeroes(0, len(old), unmap=True)
        assert source.counts["read"] - reads <= 2
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.data == before


async def test_a_cancelled_guest_write_leaves_its_cluster_to_the_workers(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        reads = source.hold("read", nth=1)
        job = rig.job(Sync.FULL)
        before = await rig.start(job)
        scope = trio.CancelScope()

        async def write() -> None:
            with scope:
                await rig.source.write(20 * CLUSTER, memoryview(b"new"))

        guests.start_soon(write)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert scope.cancelled_caught
        reads.release()
        assert await rig.finish(job) is None
    assert target.data == before == source.data


async def test_a_full_store_makes_guests_wait(source: MemoryDriver, target: MemoryDriver) -> None:
    source.nowait = lambda _: True
    writes = target.hold("write")
    done: list[int] = []
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        job = rig.job(Sync.FULL, speed=1)
        before = await rig.start(job)

        async def write(cluster: int) -> None:
            await rig.source.write(cluster * CLUSTER, memoryview(b"new"))
            done.append(cluster)

        for cluster in range(10, 18):
            guests.start_soon(write, cluster)
            await wait_all_tasks_blocked()
        # There is room for four, and none of it is free before it is written.
        assert done == [10, 11, 12, 13]
        writes.release()
        await wait_all_tasks_blocked()
        assert sorted(done) == list(range(10, 18))
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.data == before


async def test_nobody_overtakes_who_waits_for_room() -> None:
    """A busy guest would starve the others, until one of them gives the backup up."""
    store = HeldStore(CLUSTER)
    slots = [await store.wait_slot() for _ in range(4)]
    got: list[str] = []

    async def wait(name: str) -> None:
        assert await store.wait_slot() is not None
        got.append(name)

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(wait, name)
            await wait_all_tasks_blocked()
        for slot in slots[:3]:
            assert slot is not None
            store.free(slot)
            assert store.take_slot() is None
            await wait_all_tasks_blocked()
    assert got == ["a", "b", "c"]


async def test_who_no_longer_waits_for_room_takes_none() -> None:
    store = HeldStore(CLUSTER)
    for _ in range(3):
        assert store.take_slot() is not None
    last = store.take_slot()
    assert last is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.wait_slot)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    store.free(last)
    assert store.take_slot() == last


async def test_room_given_to_who_no_longer_waits_is_free_again() -> None:
    """It was cancelled, and has not run since, when the room became free."""
    store = HeldStore(CLUSTER)
    slots = [store.take_slot() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.wait_slot)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert slots[0] is not None
        store.free(slots[0])
    assert store.take_slot() == slots[0]


async def test_a_target_that_hangs_breaks_the_backup_and_not_the_guest(
    source: MemoryDriver, target: MemoryDriver, autojump_clock: MockClock
) -> None:
    source.nowait = lambda _: True
    target.hold("write")
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        job = rig.job(Sync.FULL, "b", BitmapMode.ON_SUCCESS, speed=1)
        await rig.start(job)
        began = trio.current_time()
        for cluster in range(10, 15):
            await rig.source.write(cluster * CLUSTER, memoryview(b"new"))
        waited = trio.current_time() - began
        error = await rig.finish(job)
        assert rig.dirty_bytes(bitmap) >= {0, 10 * CLUSTER, 14 * CLUSTER}
    assert waited == limits.GUEST_WAIT_FOR_COPY_SECONDS
    assert error == "The target took nothing for 10 seconds while a guest's write waited"
    assert source.data[14 * CLUSTER :][:3] == b"new"


async def test_guests_are_free_at_once_when_a_job_is_cancelled_whose_target_hangs(
    source: MemoryDriver, target: MemoryDriver, autojump_clock: MockClock
) -> None:
    source.nowait = lambda _: True
    target.stubborn = True
    writes = target.hold("write")
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        job = rig.job(Sync.FULL, speed=1)
        await rig.start(job)
        for cluster in range(10, 16):
            guests.start_soon(rig.source.write, cluster * CLUSTER, memoryview(b"new"))
        await wait_all_tasks_blocked()
        began = trio.current_time()
        await job.cancel()
        # The reply came though an I/O still hangs, and every guest write has ended.
        assert trio.current_time() - began == limits.CANCEL_REPLY_SECONDS
        assert source.data[15 * CLUSTER :][:3] == b"new"
        await rig.source.write(3 * CLUSTER, memoryview(b"new"))
        assert job.status == "running"
        writes.release()
        await rig.finish(job)
        assert rig.named("BLOCK_JOB_CANCELLED")


# -- speed and pause -----------------------------------------------------------------------------


async def test_a_paused_job_still_writes_what_guests_overwrite(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=1)
        before = await rig.start(job)
        await wait_all_tasks_blocked()
        job.pause()
        await wait_all_tasks_blocked()
        assert (job.status, job.busy) == ("paused", False)
        offset = job.current_progress
        for cluster in range(10, 18):
            await rig.source.write(cluster * CLUSTER, memoryview(b"new"))
            await wait_all_tasks_blocked()
        assert job.current_progress == offset + 8 * CLUSTER
        assert target.data[10 * CLUSTER : 18 * CLUSTER] == before[10 * CLUSTER : 18 * CLUSTER]
        job.resume()
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.data == before


async def test_the_speed_counts_holes_too(autojump_clock: MockClock) -> None:
    """As the peer's does: clients slow a backup of an empty disk down to look at it."""
    source, target = MemoryDriver(16 * CLUSTER), MemoryDriver(16 * CLUSTER)
    async with open_rig(source, target) as rig:
        began = trio.current_time()
        assert await rig.copy(Sync.FULL, speed=4 * CLUSTER) is None
        assert trio.current_time() - began == pytest.approx(3)


async def test_chunks_are_small_while_guests_write(
    source: MemoryDriver, target: MemoryDriver, autojump_clock: MockClock
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=40 * CLUSTER)
        await rig.start(job)
        await wait_all_tasks_blocked()
        await rig.source.write(0, memoryview(b"new"))
        assert await rig.finish(job) is None
    # Large at first, small in the tenth of a second in which the write was seen, then large.
    assert [each.length / CLUSTER for each in source.reads] == [4, 2, 2, 4, 4, 4, 0.5]
