"""Promise 6: what leaves no trace is found by an audit, which compares the disk with its backup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.kept_disk import GRANULE_BYTES, KeptDisk
from tests.helpers.qmp_client import QmpError


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    disk.add_bitmap()
    disk.write([1, 2])
    yield disk
    disk.end()


def change_behind_its_back(disk: KeptDisk) -> None:
    """As for a block device that somebody wrote to: the file's times say nothing."""
    with disk.image.open("r+b") as file:
        file.seek(700 * GRANULE_BYTES + 17)
        file.write(b"!")


def add_backup(disk: KeptDisk, driver: str, target: Path) -> None:
    storage = {"driver": "file", "filename": str(target)}
    node = {"driver": driver, "node-name": "backup", "read-only": True, "file": storage}
    disk.qmp.execute("blockdev-add", node)


def begin_audit(disk: KeptDisk, **options: Any) -> None:
    audit = {"node": "disk", "bitmap": "b", "target": "backup", **options}
    disk.qmp.execute("x-blockd-audit", {"job-id": "audit", **audit})


def test_what_nobody_could_see_is_found_by_an_audit(raw: KeptDisk) -> None:
    raw.back_up("full")
    raw.write([5])
    change_behind_its_back(raw)
    add_backup(raw, "raw", raw.target)
    begin_audit(raw)
    event = raw.hear("BLOCK_DIRTY_BITMAP_RECOVERED")
    assert event["reason"] == "image-changed"
    raw.qmp.wait_event("JOB_STATUS_CHANGE", id="audit", status="concluded")
    raw.check_all_dirty("image-changed")
    (job,) = raw.qmp.execute("query-jobs")
    assert "differs from its backup" in job["error"]
    raw.kill()
    raw.start()
    raw.check_all_dirty("image-changed")
    raw.back_up("incremental")
    assert raw.same_as_target()


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_a_kill_as_soon_as_it_is_told_changes_nothing(raw: KeptDisk, driver: str) -> None:
    raw.target = raw.directory / f"backup.{driver}"
    raw.begin_backup("full", format=driver)
    assert "error" not in raw.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    add_backup(raw, driver, raw.target)
    begin_audit(raw)
    raw.qmp.wait_event("JOB_STATUS_CHANGE", id="audit", status="concluded")
    raw.qmp.execute("job-dismiss", {"id": "audit"})
    raw.check_dirty([])
    change_behind_its_back(raw)
    begin_audit(raw, sample=1 << 60)
    raw.hear("BLOCK_DIRTY_BITMAP_RECOVERED")
    raw.kill()
    assert "bitmap 'b' of node 'disk' is all dirty: image-changed" in raw.daemon.log()
    raw.start()
    raw.check_all_dirty("image-changed")


def test_one_that_would_compare_nothing_is_refused(raw: KeptDisk) -> None:
    raw.back_up("full")
    add_backup(raw, "raw", raw.target)
    with pytest.raises(QmpError, match="'sample' of 0 bytes compares nothing"):
        begin_audit(raw, sample=0)
    assert raw.qmp.execute("query-jobs") == []
