"""Promise 6: an image that was changed while blockd did not have it is found out."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import DISK_BYTES, GRANULE_BYTES, KeptDisk
from tests.helpers.qcow2 import qemu_img, qemu_io


def disk_of(directory: Path, driver: str) -> Iterator[KeptDisk]:
    disk = KeptDisk(directory, driver=driver)
    disk.start()
    disk.add_bitmap()
    disk.write([1, 2])
    yield disk
    disk.end()


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[KeptDisk]:
    yield from disk_of(tmp_path, "raw")


@pytest.fixture
def qcow2(tmp_path: Path) -> Iterator[KeptDisk]:
    yield from disk_of(tmp_path, "qcow2")


def write_with_qemu_io(disk: KeptDisk) -> None:
    qemu_io(disk.image, "write 1M 4k", driver=disk.driver)


def replace_by_a_copy(disk: KeptDisk) -> None:
    copy = disk.directory / "copy"
    shutil.copy(disk.image, copy)
    copy.replace(disk.image)


def write_and_set_the_time_back(disk: KeptDisk) -> None:
    before = disk.image.stat()
    write_with_qemu_io(disk)
    os.utime(disk.image, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_some_time_after_the_kill(disk: KeptDisk) -> None:
    """Times are compared with when the daemon was last alive, which it notes every second."""
    write_with_qemu_io(disk)
    later = time.time() + 5
    os.utime(disk.image, (later, later))


def write_over_it_with_its_old_time(disk: KeptDisk) -> None:
    """As ``cp -p`` and ``rsync --inplace --times`` do."""
    disk.was_killed_long_ago()
    write_and_set_the_time_back(disk)


def write_behind_its_back(disk: KeptDisk) -> None:
    with disk.image.open("r+b") as file:
        file.seek(DISK_BYTES // 2)
        file.write(b"others")


def reopen(disk: KeptDisk, *, read_only: bool) -> None:
    file = {"driver": "file", "filename": str(disk.image)}
    node = {"driver": disk.driver, "node-name": "disk", "read-only": read_only, "file": file}
    disk.qmp.execute("blockdev-reopen", {"options": [node]})


def make_read_only(disk: KeptDisk) -> None:
    disk.unexport()
    reopen(disk, read_only=True)


def make_writable(disk: KeptDisk) -> None:
    reopen(disk, read_only=False)


def start_again(disk: KeptDisk) -> None:
    disk.quit()
    disk.start()


def start_after_a_kill(disk: KeptDisk) -> None:
    disk.kill()
    disk.start()


def check_way_out(disk: KeptDisk) -> None:
    disk.change_bitmap("clear")
    assert "reason" not in disk.infos()["b"]
    disk.check_dirty([])


@pytest.mark.parametrize(
    "change",
    [write_with_qemu_io, replace_by_a_copy, write_and_set_the_time_back],
    ids=lambda change: str(change.__name__),
)
def test_a_change_after_a_clean_end_is_found_out(
    raw: KeptDisk, change: Callable[[KeptDisk], None]
) -> None:
    raw.quit()
    change(raw)
    raw.start()
    raw.check_all_dirty("image-changed")
    assert "bitmap 'b' of node 'disk' is all dirty: image-changed" in raw.daemon.log()
    check_way_out(raw)


@pytest.mark.parametrize(
    "change",
    [write_some_time_after_the_kill, write_over_it_with_its_old_time, replace_by_a_copy],
    ids=lambda change: str(change.__name__),
)
def test_a_change_after_a_kill_is_found_out(
    raw: KeptDisk, change: Callable[[KeptDisk], None]
) -> None:
    raw.kill()
    change(raw)
    raw.start()
    raw.check_all_dirty("image-changed")
    check_way_out(raw)


@pytest.mark.parametrize(
    "go_on",
    [make_writable, start_again, start_after_a_kill],
    ids=lambda go_on: str(go_on.__name__),
)
def test_a_change_while_blockd_may_only_read_is_found_out(
    raw: KeptDisk, go_on: Callable[[KeptDisk], None]
) -> None:
    make_read_only(raw)
    go_on(raw)
    raw.check_dirty([1, 2])
    assert "reason" not in raw.infos()["b"]
    if go_on is make_writable:
        raw.export()
    raw.write([3])
    make_read_only(raw)
    write_behind_its_back(raw)
    go_on(raw)
    raw.check_all_dirty("image-changed")
    check_way_out(raw)


def test_a_qcow2_image_that_changes_while_it_is_open_to_be_read_is_found_out(
    qcow2: KeptDisk,
) -> None:
    make_read_only(qcow2)
    make_writable(qcow2)
    qcow2.check_dirty([1, 2])
    reopen(qcow2, read_only=True)
    write_behind_its_back(qcow2)
    make_writable(qcow2)
    assert qcow2.hear("BLOCK_DIRTY_BITMAP_RECOVERED")["reason"] == "image-changed"
    qcow2.check_all_dirty("image-changed")
    check_way_out(qcow2)


def test_another_size_is_found_out(raw: KeptDisk) -> None:
    raw.quit()
    os.truncate(raw.image, DISK_BYTES // 2)
    raw.start()
    raw.check_all_dirty("size-changed")
    check_way_out_of_size(raw)


def check_way_out_of_size(disk: KeptDisk) -> None:
    disk.change_bitmap("clear")
    disk.write([3])
    assert disk.infos()["b"]["count"] == GRANULE_BYTES
    assert "reason" not in disk.infos()["b"]


def test_the_event_tells_whoever_adds_the_node(raw: KeptDisk) -> None:
    raw.unexport()
    raw.qmp.execute("blockdev-del", {"node-name": "disk"})
    write_with_qemu_io(raw)
    raw.open()
    event = raw.hear("BLOCK_DIRTY_BITMAP_RECOVERED")
    assert event == {
        "node-name": "disk",
        "name": "b",
        "reason": "image-changed",
        "inconsistent": False,
    }


def test_an_image_that_was_only_read_is_as_it_was(raw: KeptDisk) -> None:
    raw.quit()
    for verb in ("info", "map"):
        qemu_img(verb, "-f", "raw", raw.image)
    raw.start()
    raw.check_dirty([1, 2])
    assert "reason" not in raw.infos()["b"]


def test_a_renamed_image_is_found_again(raw: KeptDisk) -> None:
    for end in (raw.quit, raw.kill):
        end()
        renamed = raw.image.with_suffix(f"{raw.image.suffix}.moved")
        raw.image.rename(renamed)
        raw.image = renamed
        raw.start()
        raw.check_dirty([1, 2])
        assert "reason" not in raw.infos()["b"]


def test_a_backup_by_it_makes_it_good_again(raw: KeptDisk) -> None:
    raw.back_up("full")
    raw.quit()
    write_with_qemu_io(raw)
    raw.start()
    raw.check_all_dirty("image-changed")
    raw.back_up("incremental")
    assert raw.same_as_target()
    assert "reason" not in raw.infos()["b"]
    raw.check_dirty([])


def test_what_qemu_writes_to_a_qcow2_image_is_in_its_bitmaps(qcow2: KeptDisk) -> None:
    """QEMU keeps the image's own copy right; so that one counts, where it is consistent."""
    qcow2.quit()
    write_with_qemu_io(qcow2)
    qcow2.start()
    qcow2.check_dirty([1, 2, 16])
    assert "reason" not in qcow2.infos()["b"]


def test_after_a_crash_a_qcow2_image_that_qemu_changed_is_found_out(qcow2: KeptDisk) -> None:
    """Its own copy is in use since, and QEMU leaves it so."""
    qcow2.kill()
    write_some_time_after_the_kill(qcow2)
    qcow2.start()
    qcow2.check_all_dirty("image-changed")


def test_an_older_copy_of_a_qcow2_image_is_found_out(qcow2: KeptDisk) -> None:
    """Its bitmaps are consistent, but know nothing of the backups since."""
    qcow2.quit()
    older = qcow2.directory / "older"
    shutil.copy2(qcow2.image, older)
    for end in (qcow2.quit, qcow2.kill):
        qcow2.start()
        qcow2.change_bitmap("clear")
        qcow2.write([5])
        end()
        copy = qcow2.directory / "copy"
        shutil.copy2(older, copy)
        copy.replace(qcow2.image)
        qcow2.start()
        qcow2.check_all_dirty("image-changed")
        qcow2.quit()
    shutil.copy2(older, qcow2.image)
    qcow2.start()
    qcow2.check_all_dirty("image-changed")


def test_after_a_crash_no_copy_of_a_qcow2_image_is_believed(qcow2: KeptDisk) -> None:
    """Not even with new times: consistent bitmaps are not what we left."""
    qcow2.quit()
    older = qcow2.directory / "older"
    shutil.copy(qcow2.image, older)
    qcow2.start()
    qcow2.change_bitmap("clear")
    qcow2.write([5])
    qcow2.kill()
    qcow2.was_killed_long_ago()
    shutil.copyfile(older, qcow2.image)
    qcow2.start()
    qcow2.check_all_dirty("image-changed")
