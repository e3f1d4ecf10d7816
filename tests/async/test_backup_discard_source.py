"""Space of the source given back for what was copied: when, and what never is."""

from __future__ import annotations

import errno
import logging

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.backup import BitmapMode, Sync
from blockd.errors import WouldBlock
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, Rig, open_rig
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.stepped_driver import SteppedDriver

NEW = memoryview(b"new" * 10)

pytestmark = pytest.mark.usefixtures("small_backup_limits")


def check_nothing_is_lost(rig: Rig) -> None:
    """What the source has lost, the target has, and would have after a power cut."""
    source, durable = rig.source_driver.data, rig.target_driver.durable
    assert all(OLD[at] in (source[at], durable[at]) for at in range(SIZE))


async def test_what_was_copied_is_discarded(source: MemoryDriver, target: MemoryDriver) -> None:
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL, discard_source=True) is None
    assert target.durable == OLD
    assert source.data == bytes(SIZE)


async def test_threads_copy_what_is_discarded_too() -> None:
    source, target = SteppedDriver(OLD), SteppedDriver(SIZE)
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL, discard_source=True) is None
    assert target.threads
    assert target.durable == OLD
    assert source.data == bytes(SIZE)


async def test_nothing_is_discarded_unless_asked(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
    assert source.counts["discard"] == 0


async def test_nothing_is_discarded_before_the_target_is_flushed(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        flush = target.hold("flush")
        job = rig.job(Sync.FULL, discard_source=True)
        await rig.start(job)
        await wait_all_tasks_blocked()
        assert target.data == OLD
        assert source.data == OLD
        flush.release()
        assert await rig.finish(job) is None
    assert source.data == bytes(SIZE)


async def test_space_comes_back_while_the_job_runs(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        late = source.hold("read", nth=4)
        job = rig.job(Sync.FULL, discard_source=True)
        await rig.start(job)
        await late.reached.wait()
        await wait_all_tasks_blocked()
        assert not any(source.data[: 12 * CLUSTER])
        check_nothing_is_lost(rig)
        late.release()
        assert await rig.finish(job) is None
    assert source.data == bytes(SIZE)


@pytest.mark.parametrize("inline", [True, False])
async def test_what_a_guest_has_written_stays(
    source: MemoryDriver, target: MemoryDriver, *, inline: bool
) -> None:
    source.nowait = lambda _: inline
    async with open_rig(source, target) as rig:
        flush = target.hold("flush")
        job = rig.job(Sync.FULL, discard_source=True)
        await rig.start(job)
        await wait_all_tasks_blocked()
        if inline:
            rig.source.write_nowait(5 * CLUSTER + 100, NEW)
        else:
            await rig.source.write(5 * CLUSTER + 100, NEW)
        flush.release()
        assert await rig.finish(job) is None
    assert target.durable == OLD
    expected = bytearray(SIZE)
    expected[5 * CLUSTER : 6 * CLUSTER] = OLD[5 * CLUSTER : 6 * CLUSTER]
    expected[5 * CLUSTER + 100 : 5 * CLUSTER + 100 + len(NEW)] = NEW
    assert source.data == expected


@pytest.mark.parametrize("inline", [True, False])
async def test_a_guest_waits_for_the_discard_under_way(
    source: MemoryDriver, target: MemoryDriver, *, inline: bool
) -> None:
    """If it did not, the discard could end after its write and take that away."""
    source.nowait = lambda _: inline
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        discard = source.hold("discard")
        job = rig.job(Sync.FULL, discard_source=True)
        await rig.start(job)
        await discard.reached.wait()
        await wait_all_tasks_blocked()
        if inline:
            with pytest.raises(WouldBlock):
                rig.source.write_nowait(100, NEW)
        guests.start_soon(rig.source.write, 100, NEW)
        await wait_all_tasks_blocked()
        assert source.counts["write"] == 0
        discard.release()
        assert await rig.finish(job) is None
    assert source.data[100 : 100 + len(NEW)] == NEW
    assert target.durable == OLD


async def test_an_incremental_backup_discards_what_it_copies_and_the_bitmap_knows(
    source: MemoryDriver, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await rig.source.write(7 * CLUSTER, NEW)
        assert await rig.copy(Sync.INCREMENTAL, "b", discard_source=True) is None
        assert rig.dirty_bytes(bitmap) == set(range(7 * CLUSTER, 8 * CLUSTER))
    expected = bytearray(OLD)
    expected[7 * CLUSTER : 8 * CLUSTER] = bytes(CLUSTER)
    assert source.data == expected


async def test_sync_none_discards_nothing(source: MemoryDriver, target: MemoryDriver) -> None:
    """All that it copies is what guests then have overwritten."""
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE, discard_source=True)
        await rig.start(job)
        await rig.source.write(7 * CLUSTER, NEW)
        await job.cancel()
        await rig.finish(job)
    assert source.counts["discard"] == 0


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("mode", [BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS])
async def test_a_backup_that_fails_loses_nothing(
    source: MemoryDriver, target: MemoryDriver, operation: str, mode: BitmapMode
) -> None:
    target.fail(operation, errno.EIO, nth=1 if operation == "flush" else 4, times=100)
    async with open_rig(source, target) as rig:
        rig.add_bitmap()
        job = rig.job(Sync.FULL, "b", mode, discard_source=True)
        await rig.start(job)
        assert await rig.finish(job) == "Input/output error"
        check_nothing_is_lost(rig)


async def test_a_discard_that_fails_does_not_fail_the_backup(
    source: MemoryDriver, target: MemoryDriver, caplog: pytest.LogCaptureFixture
) -> None:
    source.fail("discard", errno.EOPNOTSUPP, times=100)
    async with open_rig(source, target) as rig:
        with caplog.at_level(logging.WARNING):
            assert await rig.copy(Sync.FULL, discard_source=True) is None
    assert target.durable == OLD
    assert "job 'j': discarding on the source failed" in caplog.text
