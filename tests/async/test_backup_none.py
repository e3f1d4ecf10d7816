"""A backup that copies nothing but what guests are about to overwrite."""

from __future__ import annotations

import errno

import pytest
from trio.testing import wait_all_tasks_blocked

from blockd.backup import OnErrors, Sync
from blockd.job import OnError, Status
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, Rig, open_rig
from tests.helpers.memory_driver import MemoryDriver

pytestmark = pytest.mark.usefixtures("small_backup_limits")


def only(*clusters: int) -> bytes:
    """A disk with these clusters of old data, and zeroes else."""
    return b"".join(
        OLD[at * CLUSTER :][:CLUSTER]
        if at in clusters
        else bytes(len(OLD[at * CLUSTER :][:CLUSTER]))
        for at in range(21)
    )


async def write(rig: Rig, offset: int, length: int = 3) -> None:
    await rig.source.write(offset, memoryview(b"n" * length))


async def test_it_keeps_what_is_overwritten_until_it_is_cancelled(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE)
        await rig.start(job)
        assert (job.current_progress, job.total_progress) == (0, 21 * CLUSTER)
        await write(rig, 5 * CLUSTER + 100)
        await write(rig, 5 * CLUSTER + 200)
        await write(rig, 8 * CLUSTER - 1, CLUSTER + 2)
        await write(rig, SIZE - 3)
        await wait_all_tasks_blocked()
        assert target.data == only(5, 7, 8, 9, 20)
        assert job.current_progress == 5 * CLUSTER
        assert (job.status, job.busy) == (Status.RUNNING, False)
        await job.cancel()
        await write(rig, 0)
        assert await rig.finish(job) == "Operation canceled"
    assert target.data == only(5, 7, 8, 9, 20)


async def test_it_runs_on_when_everything_is_kept(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE)
        await rig.start(job)
        await write(rig, 0, SIZE)
        await wait_all_tasks_blocked()
        assert target.data == OLD
        assert job.current_progress == job.total_progress
        assert job.status is Status.RUNNING
        await job.cancel()
        assert await rig.finish(job) == "Operation canceled"


async def test_a_paused_one_keeps_on(source: MemoryDriver, target: MemoryDriver) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE, speed=1)
        await rig.start(job)
        job.pause()
        assert job.status is Status.PAUSED
        for cluster in range(10):
            await write(rig, cluster * CLUSTER)
        await wait_all_tasks_blocked()
        assert target.data == only(*range(10))
        await job.cancel()
        assert await rig.finish(job) == "Operation canceled"


@pytest.mark.parametrize("failing", [False, True])
async def test_a_cancel_brings_what_is_still_in_memory_to_the_target(
    source: MemoryDriver, target: MemoryDriver, *, failing: bool
) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE)
        await rig.start(job)
        for cluster in (3, 4, 5):
            # No writer has run yet when the cancel comes.
            rig.source.write_nowait(cluster * CLUSTER, memoryview(b"new"))
        if failing:
            target.fail("write", errno.EIO, times=3)
        job.request_cancel()
        assert await rig.finish(job) == "Operation canceled"
        assert job.current_progress == (0 if failing else 3 * CLUSTER)
    assert failing or target.data == only(3, 4, 5)


async def test_a_failing_target_costs_the_backup_not_the_guest(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("write", errno.EIO)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE)
        await rig.start(job)
        await write(rig, 0)
        assert await rig.finish(job) == "Input/output error"
        await write(rig, 1)
        assert len(rig.named("BLOCK_JOB_ERROR")) == 1


async def test_an_error_can_stop_it_until_it_is_resumed(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("write", errno.ENOSPC)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE, on_errors=OnErrors(target=OnError.STOP))
        await rig.start(job)
        await write(rig, 0)
        await wait_all_tasks_blocked()
        assert job.status is Status.PAUSED
        assert job.current_progress == 0
        job.resume()
        await wait_all_tasks_blocked()
        assert target.data == only(0)
        await job.cancel()
        assert await rig.finish(job) == "Operation canceled"
