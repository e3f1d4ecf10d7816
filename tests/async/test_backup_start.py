"""The instant of a backup: each guest write comes before or after all of it."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.backup import BitmapMode, Sync
from blockd.bitmap import DirtyBitmap
from tests.helpers.backup_rig import CLUSTER, OLD, Rig, open_rig
from tests.helpers.memory_driver import MemoryDriver

NEW = memoryview(b"\xfe" * CLUSTER)
EARLIER, LATER = 3 * CLUSTER, 9 * CLUSTER

pytestmark = pytest.mark.usefixtures("small_backup_limits")


def lost(rig: Rig, bitmap: DirtyBitmap) -> set[int]:
    """The bytes that are neither in the backup nor to be copied by the next one."""
    pairs = zip(rig.source_driver.data, rig.target_driver.data, strict=True)
    return {at for at, (ours, theirs) in enumerate(pairs) if ours != theirs} - rig.dirty_bytes(
        bitmap
    )


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.INCREMENTAL])
async def test_it_waits_for_the_writes_in_flight(sync: Sync) -> None:
    async with open_rig(MemoryDriver(OLD), MemoryDriver(OLD)) as rig, trio.open_nursery() as guests:
        bitmap = rig.add_bitmap()
        job = rig.job(sync, "b", BitmapMode.ON_SUCCESS)
        started = trio.Event()
        content = b""

        async def start() -> None:
            nonlocal content
            content = await rig.start(job)
            started.set()

        with rig.source_driver.hold("write") as hold:
            guests.start_soon(rig.source.write, EARLIER, NEW)
            await hold.reached.wait()
            guests.start_soon(start)
            await wait_all_tasks_blocked()
            assert not started.is_set()
            assert not bitmap.busy
            assert not rig.source._hooks
            guests.start_soon(rig.source.write, LATER, NEW)
            await wait_all_tasks_blocked()
            assert rig.source_driver.counts["write"] == 1
        await started.wait()
        assert content[EARLIER : EARLIER + CLUSTER] == NEW
        assert content[LATER : LATER + CLUSTER] == OLD[LATER : LATER + CLUSTER]
        assert await rig.finish(job) is None
        await wait_all_tasks_blocked()

        assert rig.target_driver.data == content
        assert rig.source_driver.data[LATER : LATER + CLUSTER] == NEW
        assert lost(rig, bitmap) == set()
        assert rig.dirty_bytes(bitmap) == set(range(LATER, LATER + CLUSTER))


async def test_a_start_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    async with open_rig(MemoryDriver(OLD), MemoryDriver(OLD)) as rig, trio.open_nursery() as guests:
        bitmap = rig.add_bitmap()
        job = rig.job(Sync.INCREMENTAL, "b", BitmapMode.ON_SUCCESS)
        with rig.source_driver.hold("write") as hold:
            guests.start_soon(rig.source.write, EARLIER, NEW)
            await hold.reached.wait()
            async with trio.open_nursery() as starters:
                starters.start_soon(rig.start, job)
                await wait_all_tasks_blocked()
                starters.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert rig.jobs.newest_first() == []
        assert not bitmap.busy
        assert not rig.source._hooks
        assert not rig.source.users
        assert not rig.target.users
        assert rig.dirty_bytes(bitmap) == set(range(EARLIER, EARLIER + CLUSTER))
