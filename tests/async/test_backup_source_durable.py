"""A bitmap forgets only what a crash can not take back from the disk that it belongs to."""

from __future__ import annotations

import errno

import pytest
import trio

from blockd.backup import BitmapMode, Sync
from tests.helpers.backup_rig import CLUSTER, Rig, pattern, use_small_limits
from tests.helpers.memory_driver import MemoryDriver

CLUSTERS = 16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_limits(monkeypatch)


async def back_up(rig: Rig, sync: Sync, mode: BitmapMode | None) -> str | None:
    """The job's error."""
    job = rig.job(sync, "b", mode)
    await rig.start(job)
    await job.wait_concluded()
    return job.error


@pytest.mark.parametrize(
    ("sync", "mode"),
    [
        (Sync.FULL, BitmapMode.ON_SUCCESS),
        (Sync.BITMAP, BitmapMode.ALWAYS),
        (Sync.INCREMENTAL, None),
    ],
)
async def test_what_is_clean_after_a_power_cut_is_as_in_the_backup(
    sync: Sync, mode: BitmapMode | None
) -> None:
    async with trio.open_nursery() as nursery:
        content = pattern(CLUSTERS)
        rig = Rig(nursery, MemoryDriver(content), MemoryDriver(content))
        bitmap = rig.add_bitmap()
        await rig.source.write(3 * CLUSTER, memoryview(b"w" * CLUSTER))
        assert await back_up(rig, sync, mode) is None
        await rig.source.write(5 * CLUSTER, memoryview(b"v" * CLUSTER))
    rig.source_driver.lose_power()
    dirty = bitmap.copy_bits()
    for offset in range(0, CLUSTERS * CLUSTER, CLUSTER):
        piece = slice(offset, offset + CLUSTER)
        same = rig.source_driver.data[piece] == rig.target_driver.data[piece]
        assert same or dirty.intersects(offset, CLUSTER)


async def test_a_source_that_can_not_be_flushed_keeps_its_bitmap() -> None:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery, MemoryDriver(pattern(CLUSTERS)), MemoryDriver(CLUSTERS * CLUSTER))
        bitmap = rig.add_bitmap()
        await rig.source.write(0, memoryview(b"w"))
        rig.source_driver.fail("flush", errno.EIO)
        assert await back_up(rig, Sync.INCREMENTAL, None) == "Input/output error"
        assert bitmap.count_bytes == CLUSTER
