"""What a user bounds of a backup: workers, the size of a copy, the cluster, the speed."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.backup import Performance, Sync
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, open_rig
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.stepped_driver import SteppedDriver

pytestmark = pytest.mark.usefixtures("small_backup_limits")


@pytest.mark.parametrize(("workers", "in_flight"), [(1, 1), (3, 3), (64, limits.BACKUP_WORKERS)])
async def test_so_many_copies_are_in_flight(workers: int, in_flight: int) -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    async with open_rig(source, target) as rig:
        with source.hold("read"):
            job = rig.job(Sync.FULL, performance=Performance(max_workers=workers))
            await rig.start(job)
            await wait_all_tasks_blocked()
            assert source.counts["read"] == in_flight
        assert await rig.finish(job) is None
    assert target.durable == OLD


@pytest.mark.parametrize(("max_chunk", "clusters"), [(0, 4), (1024, 1), (1025, 2), (1 << 40, 4)])
async def test_a_copy_is_no_larger(max_chunk: int, clusters: int) -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    async with open_rig(source, target) as rig:
        performance = Performance(max_chunk_bytes=max_chunk)
        assert await rig.copy(Sync.FULL, performance=performance) is None
    assert max(each.length for each in source.reads) == clusters * CLUSTER
    assert target.durable == OLD


async def test_zeroes_are_not_written_in_larger_pieces() -> None:
    source, target = MemoryDriver(bytes(SIZE)), MemoryDriver(b"t" * SIZE)
    async with open_rig(source, target) as rig:
        performance = Performance(max_chunk_bytes=2 * CLUSTER)
        assert await rig.copy(Sync.FULL, performance=performance) is None
    assert target.counts["write_zeroes"] == 11
    assert target.durable == bytes(SIZE)


@pytest.mark.parametrize(("max_chunk", "clusters"), [(0, 2), (CLUSTER, 1)])
async def test_a_thread_copies_no_more_at_once(max_chunk: int, clusters: int) -> None:
    source, target = SteppedDriver(OLD), SteppedDriver(SIZE)
    async with open_rig(source, target) as rig:
        performance = Performance(max_chunk_bytes=max_chunk)
        assert await rig.copy(Sync.FULL, performance=performance) is None
    assert target.threads
    assert max(each.length for each in source.reads) == clusters * CLUSTER
    assert target.durable == OLD


async def test_clusters_are_no_smaller() -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(9 * CLUSTER, memoryview(b"new"))
        performance = Performance(min_cluster_bytes=8 * CLUSTER)
        assert await rig.copy(Sync.INCREMENTAL, "b", performance=performance) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
        assert bitmap.count_bytes == 0
    assert end["len"] == end["offset"] == 8 * CLUSTER
    copied = slice(8 * CLUSTER, 16 * CLUSTER)
    assert target.data[copied] == source.data[copied]
    assert not any(target.data[: 8 * CLUSTER])
    assert not any(target.data[16 * CLUSTER :])


async def test_a_guest_has_its_whole_cluster_kept() -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE, performance=Performance(min_cluster_bytes=8 * CLUSTER))
        before = await rig.start(job)
        await rig.source.write(9 * CLUSTER, memoryview(b"new"))
        await job.cancel()
        await rig.finish(job)
    kept = slice(8 * CLUSTER, 16 * CLUSTER)
    assert target.data[kept] == before[kept]
    assert not any(target.data[: 8 * CLUSTER])


async def test_at_a_speed_chunks_go_one_by_one(autojump_clock: MockClock) -> None:
    """262144 bytes a second in chunks of 64 KiB is one of them each 250 ms, in this scale."""
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    async with open_rig(source, target) as rig:
        performance = Performance(max_chunk_bytes=CLUSTER)
        job = rig.job(Sync.FULL, speed=4 * CLUSTER, performance=performance)
        await rig.start(job)
        for step in range(1, 9):
            await trio.sleep(0.125)
            assert job.current_progress == step * CLUSTER
            await trio.sleep(0.125)
            assert job.current_progress == step * CLUSTER
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.durable == OLD
