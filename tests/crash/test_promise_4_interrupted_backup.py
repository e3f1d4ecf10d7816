"""Promise 4: a backup that was killed is told of, its bitmap has all, the next one repairs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import KeptDisk
from tests.helpers.qcow2 import qemu_img


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    yield disk
    disk.end()


def test_an_incremental_backup_is_repaired_by_the_next(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write(range(40), byte=1)
    disk.back_up("full")
    disk.write(range(20, 60), byte=2)
    disk.begin_slow_backup("incremental")
    disk.write([100], byte=3)
    disk.kill()
    assert disk.mark.exists()

    disk.start()
    assert disk.qmp.execute("query-block-jobs") == []
    assert disk.qmp.execute("query-jobs") == []
    told = f"backup 'backup' of node 'disk' to '{disk.target}' (sync incremental) did not end"
    assert told in disk.daemon.log()
    disk.check_dirty([*range(20, 60), 100])
    disk.back_up("incremental")
    assert not disk.mark.exists()
    assert disk.same_as_target()


@pytest.mark.parametrize("command", ["drive-backup", "blockdev-backup"])
def test_an_image_for_the_night_is_repaired_by_the_same_command(
    disk: KeptDisk, command: str
) -> None:
    """As the README has it: qcow2 files, each upon the one of the night before."""
    disk.add_bitmap()
    disk.write(range(40), byte=1)
    disk.target = disk.directory / "monday.qcow2"
    disk.begin_backup("full", format="qcow2")
    disk.qmp.wait_event("BLOCK_JOB_COMPLETED")
    monday, disk.target = disk.target, disk.directory / "tuesday.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", monday.name, "-F", "qcow2", disk.target)
    disk.write(range(20, 60), byte=2)
    begin(disk, command, speed=1)
    disk.wait_for_the_first_piece()
    disk.write([45, 100], byte=3)
    disk.kill()
    mark = Path(f"{disk.target}.blockd-incomplete")
    assert mark.exists()

    disk.start()
    assert disk.qmp.execute("query-block-jobs") == []
    told = f"backup 'backup' of node 'disk' to '{disk.target}' (sync incremental) did not end"
    assert told in disk.daemon.log()
    disk.check_dirty([*range(20, 60), 100])
    begin(disk, command)
    assert "error" not in disk.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert not mark.exists()
    disk.quit()
    qemu_img("check", disk.target)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk.image, disk.target)


def begin(disk: KeptDisk, command: str, **options: int) -> None:
    if command == "drive-backup":
        disk.begin_backup("incremental", format="qcow2", **options)
        return
    file = {"driver": "file", "filename": str(disk.target)}
    disk.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": file})
    backup = {"job-id": "backup", "device": "disk", "target": "target", "bitmap": "b"}
    disk.qmp.execute("blockdev-backup", {**backup, "sync": "incremental", **options})


def test_a_full_backup_needs_a_full_one(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write(range(40))
    disk.begin_slow_backup("full")
    disk.kill()

    disk.start()
    disk.check_dirty(range(40))
    disk.back_up("incremental")
    assert disk.mark.exists()
    disk.back_up("full")
    assert not disk.mark.exists()
    assert disk.same_as_target()


def test_of_a_bitmap_that_was_not_kept_nothing_is_promised(disk: KeptDisk) -> None:
    disk.add_bitmap(persistent=False)
    disk.write([1])
    disk.back_up("full")
    disk.write([2])
    disk.begin_slow_backup("full")
    disk.kill()

    disk.start()
    assert "bitmap 'b' was not kept, so do a full backup" in disk.daemon.log()
    assert "has all that it had" not in disk.daemon.log()
    assert disk.infos() == {}
    disk.add_bitmap()
    disk.back_up("full")
    assert not disk.mark.exists()
    assert disk.same_as_target()


def test_what_is_told_is_told_once(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write([1])
    disk.begin_slow_backup("full")
    disk.kill()
    for _ in range(2):
        disk.start()
        disk.quit()
    assert disk.daemon.log().count("did not end when blockd did") == 1


def test_nothing_is_told_of_a_backup_that_ended(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write([1])
    disk.back_up("full")
    disk.kill()
    disk.start()
    assert "did not end when blockd did" not in disk.daemon.log()
