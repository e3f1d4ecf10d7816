"""The mark beside an incomplete target: when it is there, and what takes it away."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from blockd.backup import BitmapMode, OnErrors, Sync
from blockd.backup.incomplete import IncompleteMark, Needs
from blockd.job import OnError
from tests.helpers.backup_rig import CLUSTER, OLD, Rig, open_rig
from tests.helpers.memory_driver import MemoryDriver

ON_SUCCESS, ALWAYS, NEVER = BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS, BitmapMode.NEVER

#: How a backup may end.
WELL, BADLY, WITH_GAPS = "well", "badly", "with gaps"

FULL = "full"

pytestmark = pytest.mark.usefixtures("small_backup_limits")


class Target:
    """Where a backup goes, and the mark beside it."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "target.img"
        self.mark = tmp_path / "target.img.blockd-incomplete"

    def needs(self) -> list[str]:
        """Empty where there is no mark: the target is complete."""
        assert [each.name for each in self.path.parent.iterdir()] in ([], [self.mark.name])
        if not self.mark.exists():
            return []
        needs: dict[str, Any] = json.loads(self.mark.read_bytes())["needs"]
        return ["full"] if needs["full"] else [each["name"] for each in needs["bitmaps"]]


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


async def backup(
    rig: Rig,
    target: Target,
    sync: Sync,
    used: tuple[str, BitmapMode] | tuple[()] = (),
    *,
    ends: str = WELL,
) -> None:
    """Make a backup that ends as it is told; bitmaps always have something to copy."""
    rig.source.bitmaps.recent.append((0, CLUSTER))
    if ends != WELL:
        rig.target_driver.fail("write", errno.EIO, times=5 if ends == WITH_GAPS else 1)
    policy = OnErrors(target=OnError.IGNORE if ends == WITH_GAPS else OnError.REPORT)
    error = await rig.copy(sync, *used, target_path=str(target.path), on_errors=policy)
    assert (error is None) is (ends != BADLY)
    rig.target_driver.heal()
    rig.events.clear()


# What is needed after each of a row of backups to the same file: (sync, bitmap, ends, needs).
Step = tuple[Sync, tuple[str, BitmapMode] | tuple[()], str, list[str]]

ROWS: dict[str, list[Step]] = {
    "a full backup that fails needs another": [
        (Sync.FULL, (), BADLY, [FULL]),
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), WELL, [FULL]),
        (Sync.BITMAP, ("b", ALWAYS), BADLY, [FULL]),
        (Sync.FULL, (), WELL, []),
    ],
    "its bitmap does not know what is missing": [
        (Sync.FULL, ("b", ON_SUCCESS), BADLY, [FULL]),
        (Sync.BITMAP, ("b", ON_SUCCESS), WELL, [FULL]),
    ],
    "its bitmap knows what is missing": [
        (Sync.FULL, ("b", ALWAYS), BADLY, ["b"]),
        (Sync.INCREMENTAL, ("c", ON_SUCCESS), WELL, ["b"]),
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), WELL, []),
    ],
    "an incremental that fails needs its bitmap": [
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), BADLY, ["b"]),
        (Sync.BITMAP, ("c", NEVER), BADLY, ["b", "c"]),
        (Sync.BITMAP, ("b", NEVER), WELL, ["c"]),
        (Sync.BITMAP, ("c", ALWAYS), BADLY, ["c"]),
        (Sync.FULL, (), BADLY, [FULL]),
        (Sync.FULL, ("b", ON_SUCCESS), WELL, []),
    ],
    "gaps in an incremental": [
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), WITH_GAPS, ["b"]),
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), WELL, []),
    ],
    "gaps in a full backup": [
        (Sync.FULL, (), WITH_GAPS, [FULL]),
        (Sync.FULL, ("b", ON_SUCCESS), WITH_GAPS, ["b"]),
        (Sync.INCREMENTAL, ("b", ON_SUCCESS), WELL, []),
    ],
}


@pytest.mark.parametrize("steps", ROWS.values(), ids=ROWS)
async def test_what_completes_a_target(target: Target, steps: list[Step]) -> None:
    async with open_rig(MemoryDriver(OLD), MemoryDriver(len(OLD))) as rig:
        rig.add_bitmap("b")
        rig.add_bitmap("c")
        for sync, used, ends, needs in steps:
            await backup(rig, target, sync, used, ends=ends)
            assert target.needs() == needs


async def test_what_guests_have_overwritten_is_no_backup(target: Target) -> None:
    async with open_rig(MemoryDriver(OLD), MemoryDriver(len(OLD))) as rig:
        job = rig.job(Sync.NONE, target_path=str(target.path))
        await rig.start(job)
        rig.target_driver.fail("write", errno.EIO)
        await rig.source.write(0, memoryview(b"new"))
        assert await rig.finish(job) is not None
        assert target.needs() == [FULL]
        await backup(rig, target, Sync.TOP)
        assert target.needs() == []


async def test_the_mark_is_there_before_anything_is_copied(target: Target) -> None:
    memory = MemoryDriver(len(OLD))
    seen: list[list[str]] = []

    def look(_: str) -> int:
        seen.append(target.needs())
        return 0

    memory.delay = look
    async with open_rig(MemoryDriver(OLD), memory) as rig:
        await backup(rig, target, Sync.FULL)
    assert memory.counts["write"] > 1
    assert all(needs == [FULL] for needs in seen)
    assert target.needs() == []


async def test_the_mark_goes_before_the_bitmap_forgets(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that dies in between leaves a bitmap with too much in it."""
    async with open_rig(MemoryDriver(OLD), MemoryDriver(len(OLD))) as rig:
        bitmap = rig.add_bitmap("b")
        rig.source.bitmaps.recent.append((0, CLUSTER))
        job = rig.job(Sync.INCREMENTAL, "b", target_path=str(target.path))
        commit = job.commit
        seen: list[tuple[list[str], int]] = []

        def watched_commit() -> None:
            seen.append((target.needs(), bitmap.count_bytes))
            commit()

        monkeypatch.setattr(job, "commit", watched_commit)
        await rig.start(job)
        assert await rig.finish(job) is None
    assert seen == [([], CLUSTER)]


async def test_another_bitmap_of_the_same_name_completes_nothing(target: Target) -> None:
    async with open_rig(MemoryDriver(OLD), MemoryDriver(len(OLD))) as rig:
        rig.add_bitmap("b")
        await backup(rig, target, Sync.INCREMENTAL, ("b", ON_SUCCESS), ends=BADLY)
        rig.source.bitmaps.remove("b")
        rig.add_bitmap("b")
        await backup(rig, target, Sync.INCREMENTAL, ("b", ON_SUCCESS))
        assert target.needs() == ["b"]


async def test_a_job_that_is_cancelled_leaves_the_mark(target: Target) -> None:
    memory = MemoryDriver(len(OLD))
    write = memory.hold("write")
    async with open_rig(MemoryDriver(OLD), memory) as rig:
        job = rig.job(Sync.FULL, target_path=str(target.path))
        await rig.start(job)
        await write.reached.wait()
        await job.cancel()
        await rig.finish(job)
    assert target.needs() == [FULL]


@pytest.mark.parametrize("before", [[], ["b"]])
async def test_a_job_that_is_cancelled_before_it_copies_leaves_things_as_they_were(
    target: Target, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied = False

    async def empty() -> None:
        nonlocal emptied
        await trio.lowlevel.checkpoint()
        emptied = True

    memory = MemoryDriver(len(OLD))
    async with open_rig(MemoryDriver(OLD), memory) as rig:
        rig.add_bitmap("b")
        if before:
            await backup(rig, target, Sync.INCREMENTAL, ("b", ON_SUCCESS), ends=BADLY)
        assert target.needs() == before
        writes = memory.counts["write"]
        job = rig.job(Sync.FULL, target_path=str(target.path), empty_target=empty)
        write_mark = IncompleteMark._write

        def write_and_cancel(mark: IncompleteMark, needs: Needs) -> None:
            write_mark(mark, needs)
            if not job.cancelled:
                assert target.needs() == [FULL]
                trio.from_thread.run_sync(job.request_cancel)

        monkeypatch.setattr(IncompleteMark, "_write", write_and_cancel)
        await rig.start(job)
        assert await rig.finish(job) == "Operation canceled"
    assert target.needs() == before
    assert memory.counts["write"] == writes
    assert not emptied


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"needs": {}}', '{"needs": {"full": 0}}'])
async def test_a_mark_that_can_not_be_understood_needs_everything(
    target: Target, damaged: str
) -> None:
    target.mark.write_text(damaged)
    async with open_rig(MemoryDriver(OLD), MemoryDriver(len(OLD))) as rig:
        rig.add_bitmap("b")
        await backup(rig, target, Sync.INCREMENTAL, ("b", ON_SUCCESS))
    assert target.needs() == [FULL]


async def test_a_job_that_can_not_write_its_mark_copies_nothing(tmp_path: Path) -> None:
    memory = MemoryDriver(len(OLD))
    async with open_rig(MemoryDriver(OLD), memory) as rig:
        path = tmp_path / "gone" / "target.img"
        error = await rig.copy(Sync.FULL, target_path=str(path))
    assert error == os.strerror(errno.ENOENT)
    assert memory.counts["write"] == 0
