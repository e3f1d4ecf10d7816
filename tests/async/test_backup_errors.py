"""What a backup does when its source or its target fails, and what its bitmap keeps then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.backup import BackupJob, BitmapMode, OnErrors, Sync
from blockd.block import Allocation
from blockd.errors import BlockdError
from blockd.job import OnError
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, Rig, open_rig
from tests.helpers.error_policies import (
    EIO,
    ENDED_WELL,
    ENOSPC,
    IO_STATUS,
    POLICIES,
    events_of,
    told,
)
from tests.helpers.memory_driver import MemoryDriver

ON_SUCCESS, ALWAYS, NEVER = BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS, BitmapMode.NEVER

pytestmark = pytest.mark.usefixtures("small_backup_limits")


def everywhere(policy: OnError) -> OnErrors:
    return OnErrors(source=policy, target=policy)


def story(rig: Rig) -> list[Any]:
    """What clients saw since the job was started."""
    return told((event.name, event.data) for event in rig.events[4:])


@pytest.mark.parametrize(("number", "policy", "action"), POLICIES)
@pytest.mark.parametrize("operation", ["read", "write"])
async def test_an_error_that_passes(
    operation: str, number: int, policy: OnError, action: str
) -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(SIZE)
    fault = (source if operation == "read" else target).fail(operation, number, nth=2)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, on_errors=everywhere(policy))
        await rig.start(job)
        await wait_all_tasks_blocked()
        if action == "stop":
            assert job.status == "paused"
            assert job.io_status == IO_STATUS[number]
            job.resume()
        error = await rig.finish(job)
        assert story(rig) == events_of(operation, number, action)
    assert fault.hits == 1
    if action != "report":
        assert error is None
        assert target.durable == OLD


async def test_errors_that_come_together_stop_the_job_once(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("write", ENOSPC, times=4)
    target.delay = lambda _: 50
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, on_errors=everywhere(OnError.AUTO))
        await rig.start(job)
        await wait_all_tasks_blocked()
        job.resume()
        assert await rig.finish(job) is None
        assert story(rig) == [("write", "stop"), "paused", "running", *ENDED_WELL]
    assert target.data == OLD


async def test_a_job_that_is_stopped_holds_its_bitmap_and_can_be_cancelled(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("write", ENOSPC, times=100)
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        job = rig.job(Sync.INCREMENTAL, "b", on_errors=everywhere(OnError.STOP))
        await rig.start(job)
        for _ in range(3):
            await wait_all_tasks_blocked()
            assert job.status == "paused"
            assert (bitmap.busy, bitmap.count_bytes) == (True, CLUSTER)
            job.resume()
        await wait_all_tasks_blocked()
        await job.cancel()
        assert await rig.finish(job) == "Operation canceled"
        assert bitmap.count_bytes == CLUSTER


async def test_a_held_write_that_is_stopped_is_written_after_the_pause(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=1, on_errors=everywhere(OnError.STOP))
        before = await rig.start(job)
        await wait_all_tasks_blocked()
        target.fail("write", ENOSPC)
        await rig.source.write(15 * CLUSTER, memoryview(b"new"))
        await wait_all_tasks_blocked()
        assert (job.status, job.io_status) == ("paused", "nospace")
        job.resume()
        job.set_speed(0)
        assert await rig.finish(job) is None
    assert target.data == before


# -- errors that stay, and are ignored -----------------------------------------------------------


BAD = range(6 * CLUSTER, 7 * CLUSTER)


@pytest.mark.parametrize("bad", ["source", "target", "target, zeroes"])
@pytest.mark.parametrize(
    ("sync", "mode"),
    [
        (Sync.FULL, ON_SUCCESS),
        (Sync.FULL, ALWAYS),
        (Sync.BITMAP, ON_SUCCESS),
        (Sync.BITMAP, ALWAYS),
        (Sync.BITMAP, NEVER),
    ],
)
async def test_what_was_ignored_stays_dirty(sync: Sync, mode: BitmapMode, bad: str) -> None:
    old = bytearray(OLD)
    if bad == "target, zeroes":
        old[4 * CLUSTER : 9 * CLUSTER] = bytes(5 * CLUSTER)
    source, target = MemoryDriver(old), MemoryDriver(b"t" * SIZE)
    (source if bad == "source" else target).bad = BAD
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        bitmap.merge_from([])
        rig.source.bitmaps.recent.append((0, SIZE))
        job = rig.job(sync, "b", mode, on_errors=everywhere(OnError.IGNORE))
        await rig.start(job)
        assert await rig.finish(job) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
        kept = rig.dirty_bytes(bitmap)
    assert kept == set(range(SIZE) if mode is NEVER else BAD)
    assert end["len"] - end["offset"] == CLUSTER
    assert all(target.data[at] == old[at] for at in range(SIZE) if at not in BAD)


async def test_a_guest_goes_on_where_its_old_data_can_not_be_read(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        job = rig.job(
            Sync.FULL, "b", ON_SUCCESS, speed=1, on_errors=OnErrors(source=OnError.IGNORE)
        )
        await rig.start(job)
        await wait_all_tasks_blocked()
        source.fail("read", EIO)
        await rig.source.discard(6 * CLUSTER, CLUSTER)
        job.set_speed(0)
        assert await rig.finish(job) is None
        assert rig.dirty_bytes(bitmap) == set(BAD)
        assert rig.named("BLOCK_JOB_ERROR") == [
            {"device": "j", "operation": "read", "action": "ignore"}
        ]


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP])
async def test_old_data_that_can_not_be_read_breaks_the_backup_and_not_the_guest(
    source: MemoryDriver, target: MemoryDriver, policy: OnError
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, speed=1, on_errors=everywhere(policy))
        await rig.start(job)
        await wait_all_tasks_blocked()
        source.fail("read", EIO)
        await rig.source.discard(6 * CLUSTER, CLUSTER)
        assert await rig.finish(job) == "Input/output error"
        assert rig.named("BLOCK_JOB_ERROR") == [
            {"device": "j", "operation": "read", "action": "report"}
        ]
    assert not any(source.data[6 * CLUSTER : 7 * CLUSTER])


# -- the end of a failed backup ------------------------------------------------------------------


async def failed_copy(rig: Rig, sync: Sync, mode: BitmapMode) -> set[int]:
    """Let the third chunk fail; a guest has written to two clusters in the meantime."""
    bitmap = rig.add_bitmap()
    rig.source.bitmaps.recent.append((0, 16 * CLUSTER))
    fault = rig.target_driver.fail("write", EIO, nth=3)
    third = rig.target_driver.hold("write", nth=3)
    job = rig.job(sync, "b", mode)
    await rig.start(job)
    await third.reached.wait()
    await wait_all_tasks_blocked()
    await rig.source.write(CLUSTER, memoryview(b"new"))
    await rig.source.write(18 * CLUSTER, memoryview(b"new"))
    third.release()
    assert await rig.finish(job) == "Input/output error"
    assert fault.hits == 1
    return {at // CLUSTER for at in rig.dirty_bytes(bitmap)}


async def test_always_keeps_only_what_is_not_on_the_target(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        kept = await failed_copy(rig, Sync.BITMAP, ALWAYS)
    missing = {at // CLUSTER for at in range(16 * CLUSTER) if target.durable[at] != OLD[at]}
    assert missing | {1, 18} <= kept < {*range(16), 18}


async def test_always_keeps_everything_where_the_target_can_not_be_flushed(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("flush", EIO)
    async with open_rig(source, target) as rig:
        assert await failed_copy(rig, Sync.BITMAP, ALWAYS) == {*range(16), 18}


async def test_always_keeps_the_whole_disk_where_a_full_backup_can_not_be_flushed(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("flush", EIO)
    async with open_rig(source, target) as rig:
        assert await failed_copy(rig, Sync.FULL, ALWAYS) == set(range(21))


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.BITMAP])
async def test_on_success_keeps_all_it_had(
    source: MemoryDriver, target: MemoryDriver, sync: Sync
) -> None:
    async with open_rig(source, target) as rig:
        assert await failed_copy(rig, sync, ON_SUCCESS) == {*range(16), 18}


async def test_a_flush_that_fails_at_the_end_fails_the_job(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.fail("flush", ENOSPC)
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        assert await rig.copy(Sync.INCREMENTAL, "b") == "No space left on device"
        assert bitmap.count_bytes == CLUSTER


async def test_a_cancel_while_writes_are_in_flight(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    target.stubborn = True
    writes = target.hold("write")
    async with open_rig(source, target) as rig, trio.open_nursery() as nursery:
        bitmap = rig.add_bitmap()
        rig.source.bitmaps.recent.append((0, 16 * CLUSTER))
        job = rig.job(Sync.BITMAP, "b", ALWAYS)
        await rig.start(job)
        await writes.reached.wait()
        nursery.start_soon(job.cancel)
        await wait_all_tasks_blocked()
        # Guests are free; the bitmap is not, while the target may still change.
        await rig.source.write(0, memoryview(b"new"))
        assert bitmap.busy
        writes.release()
        await rig.finish(job)
        kept = {at // CLUSTER for at in rig.dirty_bytes(bitmap)}
    missing = {at // CLUSTER for at in range(16 * CLUSTER) if target.durable[at] != OLD[at]}
    assert missing | {0} <= kept


async def test_what_was_read_while_guests_were_free_is_not_taken_for_old_data(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    """A disabled bitmap does not see what those guests write, so it must keep the clusters."""
    source.stubborn = target.stubborn = True
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        rig.source.bitmaps.recent.append((0, SIZE))
        bitmap.disable()
        reads = source.hold("read")
        job = rig.job(Sync.BITMAP, "b", ALWAYS)
        await rig.start(job)
        await reads.reached.wait()
        job.request_cancel()
        await wait_all_tasks_blocked()
        await rig.source.write(0, memoryview(b"new"))
        reads.release()
        await rig.finish(job)
        assert 0 in rig.dirty_bytes(bitmap)


@asynccontextmanager
async def writer_left(rig: Rig) -> AsyncIterator[BackupJob]:
    """A job that keeps a bitmap which sees no writes, and a writer of held data that hangs.

    That writer goes on at the end, though the job was cancelled, until there is nothing to write.
    """
    rig.target_driver.stubborn = True
    bitmap = rig.add_bitmap()
    rig.source.bitmaps.recent.append((0, SIZE))
    bitmap.disable()
    with rig.target_driver.hold("write"):
        job = rig.job(Sync.BITMAP, "b", ALWAYS, speed=1)
        await rig.start(job)
        await rig.source.write(12 * CLUSTER, memoryview(b"new"))
        await wait_all_tasks_blocked()
        yield job
    await rig.finish(job)


async def test_what_a_guest_read_while_others_were_free_is_not_taken_for_old_data(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        async with writer_left(rig) as job:
            with source.hold("read"):
                guests.start_soon(rig.source.write, 15 * CLUSTER, memoryview(b"a"))
                await wait_all_tasks_blocked()
                job.request_cancel()
                await wait_all_tasks_blocked()
                await rig.source.write(15 * CLUSTER, memoryview(b"b" * CLUSTER))
            await wait_all_tasks_blocked()
        assert 15 * CLUSTER in rig.dirty_bytes(rig.source.bitmaps.get("b"))


async def test_what_was_a_hole_before_guests_were_free_is_not_taken_for_old_data(
    target: MemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HOLE_SEARCH_CLUSTERS", 1)
    old = bytearray(OLD)
    old[15 * CLUSTER : 16 * CLUSTER] = bytes(CLUSTER)
    source = MemoryDriver(old)
    async with open_rig(source, target) as rig:
        async with writer_left(rig) as job:
            allocation = source.allocation

            async def cancelled_meanwhile(offset: int, length: int) -> Sequence[Allocation]:
                runs = await allocation(offset, length)
                job.request_cancel()
                await wait_all_tasks_blocked()
                await rig.source.write(15 * CLUSTER, memoryview(b"b" * CLUSTER))
                return runs

            monkeypatch.setattr(source, "allocation", cancelled_meanwhile)
            await rig.source.write(15 * CLUSTER, memoryview(b"a"))
        assert 15 * CLUSTER in rig.dirty_bytes(rig.source.bitmaps.get("b"))


async def test_a_guest_write_that_hangs_does_not_keep_the_bitmap(
    source: MemoryDriver, target: MemoryDriver, autojump_clock: MockClock
) -> None:
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"new"))
        job = rig.job(Sync.INCREMENTAL, "b")
        await rig.start(job)
        hangs = source.hold("write")
        guests.start_soon(rig.source.write, 5 * CLUSTER, memoryview(b"new"))
        await job.wait_concluded()
        assert job.error == f"not done within {limits.JOB_CLEANUP_SECONDS} seconds"
        assert not bitmap.busy
        assert bitmap.count_bytes == 2 * CLUSTER
        hangs.release()
        job.dismiss()


async def test_a_bitmap_in_use_refuses_the_job_at_its_start(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        job = rig.job(Sync.INCREMENTAL, "b")
        pin = bitmap.pin("export")
        with pytest.raises(BlockdError, match="in use by another operation"):
            await rig.start(job)
        pin.release()
        assert not rig.source._hooks
        assert not rig.source.users
