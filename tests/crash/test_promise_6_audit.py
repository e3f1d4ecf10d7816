"""Promise 6: what leaves no trace is found by an audit, which compares the disk with its backup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import GRANULE_BYTES, KeptDisk


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    disk.add_bitmap()
    disk.write([1, 2])
    yield disk
    disk.end()


def test_what_nobody_could_see_is_found_by_an_audit(raw: KeptDisk) -> None:
    raw.back_up("full")
    raw.write([5])
    # As for a block device that somebody wrote to: the file's times say nothing, blockd has it.
    with raw.image.open("r+b") as file:
        file.seek(700 * GRANULE_BYTES + 17)
        file.write(b"!")
    storage = {"driver": "file", "filename": str(raw.target)}
    target = {"driver": "raw", "node-name": "backup", "read-only": True, "file": storage}
    raw.qmp.execute("blockdev-add", target)
    audit = {"node": "disk", "bitmap": "b", "target": "backup"}
    raw.qmp.execute("x-blockd-audit", {"job-id": "audit", **audit})
    event = raw.hear("BLOCK_DIRTY_BITMAP_RECOVERED")
    assert event["reason"] == "image-changed"
    raw.qmp.wait_event("JOB_STATUS_CHANGE", status="concluded")
    raw.check_all_dirty("image-changed")
    (job,) = raw.qmp.execute("query-jobs")
    assert "differs from its backup" in job["error"]
    raw.kill()
    raw.start()
    raw.check_all_dirty("image-changed")
    raw.back_up("incremental")
    assert raw.same_as_target()
