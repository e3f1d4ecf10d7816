"""The target of a sync none backup that stands on its source: what its readers get, and when."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.backup import BackupJob, BackupRequest, OnErrors, Sync, plan_backup
from blockd.block import Graph
from blockd.errors import WouldBlock
from blockd.events import Bus
from blockd.job import Jobs, OnError
from tests.helpers.backup_rig import CLUSTER, pattern, start_job, use_small_limits
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

OLD = bytes(CLUSTER) + pattern(7)


class Fleecing:
    """A disk, an overlay on it, and a job that keeps the disk's old data in the overlay."""

    def __init__(self, tasks: trio.Nursery) -> None:
        graph = Graph(tasks)
        self.disk_driver = MemoryDriver(OLD)
        self.disk = graph.add("disk", self.disk_driver, owned=True)
        self.overlay_driver = MemoryOverlay(len(OLD), self.disk)
        self.overlay = graph.add("overlay", self.overlay_driver, owned=True)
        self.jobs = Jobs(tasks, Bus())

    async def start(self, sync: Sync = Sync.NONE, on_target: OnError = OnError.REPORT) -> BackupJob:
        plan = plan_backup(BackupRequest(sync), self.disk, self.overlay)
        on_errors = OnErrors(target=on_target)
        job = BackupJob("j", plan, self.disk, self.overlay, on_errors=on_errors)
        await start_job(self.jobs, self.disk, job)
        return job

    async def seen(self, offset: int = 0, length: int | None = None) -> bytes:
        view = memoryview(bytearray(len(OLD) - offset if length is None else length))
        await self.overlay.read(offset, view)
        return bytes(view)


@pytest.fixture
async def fleecing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleecing]:
    use_small_limits(monkeypatch)
    async with trio.open_nursery() as tasks:
        yield Fleecing(tasks)


async def end(job: BackupJob) -> None:
    job.request_cancel()
    await job.wait_concluded()


async def test_old_data_is_seen_while_it_is_in_memory(fleecing: Fleecing) -> None:
    job = await fleecing.start()
    with fleecing.overlay_driver.hold("write"):
        await fleecing.disk.write(3 * CLUSTER + 1, memoryview(b"new"))
        assert await fleecing.seen() == OLD
        (run,) = await fleecing.overlay.allocation(3 * CLUSTER, CLUSTER)
        assert (run.zero, run.depth) == (False, 1)
    assert await fleecing.seen() == OLD
    await end(job)


async def test_a_reader_on_the_way_to_the_disk_reads_again(fleecing: Fleecing) -> None:
    job = await fleecing.start()
    fleecing.disk_driver.nowait = lambda _: True
    seen: list[bytes] = []

    async def reader() -> None:
        seen.append(await fleecing.seen())

    with fleecing.disk_driver.hold("read") as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await hold.reached.wait()
            # The guest waits for no reader.
            fleecing.disk.write_nowait(3 * CLUSTER, memoryview(b"new"))
            await wait_all_tasks_blocked()
            hold.release()
    assert seen == [OLD]
    await end(job)


@pytest.mark.parametrize("sync", [Sync.NONE, Sync.FULL])
async def test_zeroes_of_the_disk_are_kept_too(fleecing: Fleecing, sync: Sync) -> None:
    job = await fleecing.start(sync)
    await fleecing.disk.write(0, memoryview(b"new"))
    if sync is Sync.NONE:
        await wait_all_tasks_blocked()
        assert await fleecing.seen() == OLD
        job.request_cancel()
    await job.wait_concluded()
    assert await fleecing.seen() == OLD


async def test_it_is_an_overlay_again_in_the_end(fleecing: Fleecing) -> None:
    fleecing.overlay_driver.nowait = lambda _: True
    job = await fleecing.start()
    with pytest.raises(WouldBlock):
        fleecing.overlay.read_nowait(0, memoryview(bytearray(1)))
    await fleecing.disk.write(3 * CLUSTER, memoryview(b"new"))
    await end(job)
    await fleecing.disk.write(5 * CLUSTER, memoryview(b"new"))
    assert await fleecing.seen(3 * CLUSTER, 3) == OLD[3 * CLUSTER : 3 * CLUSTER + 3]
    assert await fleecing.seen(5 * CLUSTER, 3) == b"new"


async def test_a_start_that_is_taken_back_leaves_an_overlay(fleecing: Fleecing) -> None:
    plan = plan_backup(BackupRequest(Sync.NONE), fleecing.disk, fleecing.overlay)
    job = BackupJob("j", plan, fleecing.disk, fleecing.overlay, on_errors=OnErrors())
    async with fleecing.disk.quiesced():
        fleecing.jobs.admit(job)
        job.revoke()
    await fleecing.disk.write(3 * CLUSTER, memoryview(b"new"))
    assert await fleecing.seen(3 * CLUSTER, 3) == b"new"


async def test_nobody_takes_anything_else_for_an_instant_that_was_lost(fleecing: Fleecing) -> None:
    job = await fleecing.start()
    fleecing.overlay_driver.fail("write", errno.ENOSPC)
    await fleecing.disk.write(3 * CLUSTER, memoryview(b"new"))
    await job.wait_concluded()
    assert job.error is not None
    for offset in (0, 3 * CLUSTER):
        with pytest.raises(OSError, match="Input/output"):
            await fleecing.seen(offset, 1)
        with pytest.raises(OSError, match="Input/output"):
            await fleecing.overlay.allocation(offset, 1)


async def test_what_the_backup_went_without_can_not_be_read(fleecing: Fleecing) -> None:
    job = await fleecing.start(on_target=OnError.IGNORE)
    fleecing.overlay_driver.fail("write", errno.ENOSPC, times=99)
    await fleecing.disk.write(3 * CLUSTER, memoryview(b"new"))
    await wait_all_tasks_blocked()
    with pytest.raises(OSError, match="Input/output"):
        await fleecing.seen(3 * CLUSTER, 1)
    assert await fleecing.seen(4 * CLUSTER) == OLD[4 * CLUSTER :]
    await end(job)
