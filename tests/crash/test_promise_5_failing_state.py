"""Promise 5: whatever becomes of the state directory, guests keep their disks, and all is told."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import GRANULE_BYTES, MIB, KeptDisk
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpError
from tests.helpers.tools import lacking, require_tool


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    yield disk
    disk.end()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[KeptDisk]:
    """A disk whose state directory is on a file system of its own, which is soon full."""
    state = tmp_path / "small"
    state.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", str(state)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        lacking("nothing may be mounted here")
    disk = KeptDisk(tmp_path, state=state)
    try:
        yield disk
        disk.end()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.fixture
def breaking(tmp_path: Path) -> Iterator[tuple[KeptDisk, Path]]:
    """A disk whose state directory is on a file system that is read-only once one writes there."""
    state, device = tmp_path / "breaking", tmp_path / "device"
    state.mkdir()
    with device.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run([require_tool("mke2fs"), "-q", "-t", "ext4", str(device)], check=True)
    mount = ["mount", "-t", "ext4", "-o", "loop,errors=remount-ro", str(device), str(state)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        lacking("nothing may be mounted here")
    try:
        number = state.stat().st_dev
        loop = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
        disk = KeptDisk(tmp_path, state=state / "state")
        yield disk, Path("/sys/fs/ext4") / loop / "trigger_fs_error"
        disk.end()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def test_guests_write_on_when_it_has_become_read_only(breaking: tuple[KeptDisk, Path]) -> None:
    disk, breaks = breaking
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    breaks.write_text("blockd's tests")
    granules = write_everywhere(disk)
    event = disk.hear("BLOCK_DIRTY_BITMAPS_UNSAFE")
    assert event["node-name"] == "disk"
    disk.check_dirty([1, *granules])
    assert "If the daemon is killed now, do a full backup" in disk.daemon.log()
    disk.back_up("full")
    assert disk.same_as_target()
    disk.quit()


def fill(directory: Path) -> Path:
    """Leave no byte free."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (64 * 1024, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


def write_everywhere(disk: KeptDisk) -> list[int]:
    """Into each region that is armed by itself."""
    granules = [at * 16 * 16 + 3 for at in range(4)]
    disk.write(granules)
    return granules


def test_guests_write_on_when_it_is_full(small: KeptDisk) -> None:
    small.start()
    small.add_bitmap()
    small.write([1])
    fill(small.state)
    granules = write_everywhere(small)
    event = small.hear("BLOCK_DIRTY_BITMAPS_UNSAFE")
    assert event["node-name"] == "disk"
    assert "No space left" in event["error"] or "full" in event["error"]
    small.check_dirty([1, *granules])

    small.kill()
    small.start()
    small.check_all_dirty("state-damaged")
    with NbdClient.open(str(small.directory / "nbd.sock"), "disk") as client:
        assert client.read(granules[0] * 64 * 1024 + 8192, 4) == b"\1" * 4


def test_it_is_safe_again_when_there_is_room(small: KeptDisk) -> None:
    small.start()
    small.add_bitmap()
    filler = fill(small.state)
    granules = write_everywhere(small)
    small.hear("BLOCK_DIRTY_BITMAPS_UNSAFE")
    filler.unlink()
    small.hear("BLOCK_DIRTY_BITMAPS_SAFE")
    small.kill()
    small.start()
    small.check_dirty(granules)


@pytest.mark.parametrize("first", [True, False])
def test_a_transaction_adds_no_bitmap_that_a_kill_would_take_away(
    small: KeptDisk, *, first: bool
) -> None:
    small.start()
    if not first:
        small.add_bitmap("old")
    small.write([1])
    filler = fill(small.state)
    before = small.infos()
    with pytest.raises(QmpError, match="'b' can't be kept: the state directory can't be written"):
        add_and_clear(small)
    assert small.infos() == before
    filler.unlink()
    add_and_clear(small)
    small.write([2])
    small.kill()
    small.start()
    small.check_dirty([2])
    assert not any("reason" in info for info in small.infos().values())


def test_a_bitmap_that_is_refused_costs_the_others_nothing(small: KeptDisk) -> None:
    small.start()
    small.add_bitmap("old")
    small.write([1])
    fill(small.state)
    with pytest.raises(QmpError, match="'b' can't be kept: the state directory can't be written"):
        small.add_bitmap()
    small.kill()
    small.start()
    small.check_dirty([1], "old")
    assert list(small.infos()) == ["old"]


def add_and_clear(disk: KeptDisk) -> None:
    """Of two actions, the first is to be kept."""
    bitmap = {"node": "disk", "name": "b"}
    added = {**bitmap, "persistent": True, "granularity": GRANULE_BYTES}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": added},
        {"type": "block-dirty-bitmap-clear", "data": bitmap},
    ]
    disk.qmp.execute("transaction", {"actions": actions})


def marks(disk: KeptDisk) -> Path:
    return max(path for path in (disk.state / "marks").iterdir() if path.name != "heartbeat")


def test_damaged_marks_leave_all_dirty(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    disk.kill()
    path = marks(disk)
    with path.open("r+b") as file:
        file.write(b"\xff" * 4096)
    disk.start()
    disk.check_all_dirty("state-damaged")
    disk.change_bitmap("clear")
    disk.write([4])
    disk.kill()
    disk.start()
    disk.check_dirty([4])
    assert "reason" not in disk.infos()["b"]


def test_missing_marks_leave_all_dirty(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    disk.kill()
    marks(disk).unlink()
    disk.start()
    disk.check_all_dirty("state-damaged")


def test_a_damaged_piece_leaves_all_dirty(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap()
    disk.write(range(0, 1000, 3))
    disk.quit()
    with contextlib.closing(sqlite3.connect(disk.state / "state.db")) as database, database:
        (piece,) = database.execute("SELECT data FROM piece").fetchone()
        damaged = piece[:-8] + bytes([piece[-8] ^ 1]) + piece[-7:]
        assert database.execute("UPDATE piece SET data = ?", [damaged]).rowcount == 1
    disk.start()
    disk.check_all_dirty("state-damaged")


def test_a_database_that_is_none_keeps_no_disk_from_opening(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    disk.quit()
    database = disk.state / "state.db"
    database.write_bytes(b"\x5a" * database.stat().st_size)
    disk.start()
    assert "is damaged: a new one is made" in disk.daemon.log()
    # Which bitmaps there were, stands beside the marks, too.
    disk.check_all_dirty("state-damaged")
    disk.change_bitmap("clear")
    disk.write([2])
    disk.kill()
    disk.start()
    disk.check_dirty([2])


def test_a_directory_of_others_is_refused(disk: KeptDisk, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(bytes(MIB))
    with pytest.raises(RuntimeError, match="state"):
        disk.start()
    assert disk.daemon.wait() == 1
