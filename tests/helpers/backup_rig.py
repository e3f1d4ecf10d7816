"""Backups from memory to memory: two nodes over scripted drivers, a registry, what clients see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from blockd import limits
from blockd.backup import (
    BackupJob,
    BackupRequest,
    BitmapMode,
    OnErrors,
    Performance,
    Sync,
    plan_backup,
)
from blockd.bitmap import DirtyBitmap
from blockd.block import Claim, Node, Role
from blockd.events import Bus, Event
from blockd.job import Group, Jobs, Status
from tests.helpers.memory_driver import MemoryDriver

CLUSTER = 1024

#: A job that hangs fails its test then; more than any of them takes by a mock clock.
PATIENCE_SECONDS = 200


def use_small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of 1 KiB, chunks of 4, sweeps of 8, and room for 4 clusters of held data."""
    monkeypatch.setattr(limits, "BACKUP_CLUSTER_BYTES", CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_CHUNK_BYTES", 4 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_CHUNK_BUSY_BYTES", 2 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_SWEEP_BYTES", 8 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_SWEEP_BUSY_BYTES", 4 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_STEP_BYTES", 2 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_MAP_BYTES", 8 * CLUSTER)
    monkeypatch.setattr(limits, "BACKUP_DISCARD_BYTES", 6 * CLUSTER)
    monkeypatch.setattr(limits, "HELD_BYTES_LIMIT", 4 * CLUSTER)
    monkeypatch.setattr(limits, "HOLE_SEARCH_CLUSTERS", 3)
    monkeypatch.setattr(limits, "INLINE_SAVE_BYTES", 2 * CLUSTER)


def pattern(clusters: int, tail_bytes: int = 0) -> bytes:
    """Content in which each cluster is full of its own byte, never zero."""
    whole = b"".join(bytes([number % 200 + 1]) * CLUSTER for number in range(clusters))
    return whole + bytes([201]) * tail_bytes


#: What the disk holds that most tests back up: 21 clusters, of the last one a half.
OLD = pattern(20, 512)
SIZE = len(OLD)


async def start_job(jobs: Jobs, source: Node, job: BackupJob) -> None:
    """Start a job, as a command does; there is no checkpoint between that and the return."""
    try:
        async with source.quiesced():
            jobs.admit(job)
            jobs.begin([Group([job], source.quiesced)])
    except BaseException:
        await job.give_up()
        raise


class Rig:
    """A source and a target. ``events`` are all that were published."""

    def __init__(self, nursery: trio.Nursery, source: MemoryDriver, target: MemoryDriver) -> None:
        self.source_driver = source
        self.target_driver = target
        self.source = Node("source", source)
        self.target = Node("target", target)
        self.events: list[Event] = []
        bus = Bus()
        bus.subscribe(self.events.append)
        self.jobs = Jobs(nursery, bus)

    def add_bitmap(self, name: str = "b", granularity_bytes: int = CLUSTER) -> DirtyBitmap:
        return self.source.bitmaps.add(name, granularity_bytes)

    def job(
        self,
        sync: Sync = Sync.FULL,
        bitmap: str | None = None,
        mode: BitmapMode | None = None,
        *,
        on_errors: OnErrors | None = None,
        performance: Performance | None = None,
        discard_source: bool = False,
        **others: Any,
    ) -> BackupJob:
        performance = performance or Performance()
        request = BackupRequest(
            sync, bitmap, mode, discard_source=discard_source, performance=performance
        )
        plan = plan_backup(request, self.source, self.target)
        on_errors = on_errors or OnErrors()
        claim = Claim("block job 'j'", Role.SOURCE)
        self.source.users.add(claim)

        async def release() -> None:
            self.source.users.remove(claim)

        return BackupJob(
            "j",
            plan,
            self.source,
            self.target,
            on_errors=on_errors,
            release=release,
            auto_dismiss=False,
            **others,
        )

    async def start(self, job: BackupJob) -> bytes:
        """Start a job; returns what the source held at that instant."""
        await start_job(self.jobs, self.source, job)
        # There was no checkpoint between the job's start and this.
        return bytes(self.source_driver.data)

    async def finish(self, job: BackupJob) -> str | None:
        """Wait until a job is over; returns its error. Nothing may be left of it."""
        with trio.fail_after(PATIENCE_SECONDS):
            await job.wait_concluded()
        error = job.error
        job.dismiss()
        assert not self.source._hooks
        assert not self.source.users
        assert not any(bitmap.busy for bitmap in self.source.bitmaps.list())
        return error

    async def copy(self, *args: Any, **others: Any) -> str | None:
        """Run a backup to its end, while guests are idle; returns its error."""
        job = self.job(*args, **others)
        await self.start(job)
        return await self.finish(job)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The data of all events of a name."""
        return [event.data for event in self.events if event.name == name]

    def dirty_bytes(self, bitmap: DirtyBitmap) -> set[int]:
        """The offsets at which the bitmap, in any state that is not in use, is dirty."""
        extents = bitmap.usable_bits().extents()
        return {at for extent in extents for at in range(extent.offset, extent.end)}


@asynccontextmanager
async def open_rig(source: MemoryDriver, target: MemoryDriver) -> AsyncIterator[Rig]:
    """A rig whose jobs must have ended by the end of the body, and guests with them."""
    with trio.fail_after(2 * PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            rig = Rig(nursery, source, target)
            yield rig
            assert [
                job.status for job in rig.jobs.newest_first() if job.status is not Status.NULL
            ] == []
