"""Promise 5: a bitmap that came back other than it was says why, and one command is the way out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import DISK_BYTES, KeptDisk
from tests.helpers.qmp_client import QmpError


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeptDisk]:
    """Two bitmaps, of which one has a backup."""
    disk = KeptDisk(tmp_path, driver=request.param)
    disk.start()
    disk.add_bitmap("b")
    disk.add_bitmap("c")
    disk.write([1, 2])
    disk.back_up("full")
    disk.write([3])
    yield disk
    disk.end()


def damage_the_state(disk: KeptDisk) -> None:
    disk.kill()
    for path in (disk.state / "marks").iterdir():
        if path.name != "heartbeat":
            path.write_bytes(b"\xff" * path.stat().st_size)


def replace_the_image(disk: KeptDisk) -> None:
    disk.kill()
    copy = disk.directory / "copy"
    shutil.copy(disk.image, copy)
    copy.replace(disk.image)


def make_it_longer(disk: KeptDisk) -> None:
    disk.quit()
    os.truncate(disk.image, DISK_BYTES * 2)
    disk.target.unlink()


def hear_both(disk: KeptDisk, reason: str, *, inconsistent: bool) -> Collection[str]:
    """The names of the bitmaps, when the event of each has come."""
    names = set()
    for _ in range(2):
        event = disk.hear("BLOCK_DIRTY_BITMAP_RECOVERED")
        names.add(event.pop("name"))
        assert event == {"node-name": "disk", "reason": reason, "inconsistent": inconsistent}
    assert names == {"b", "c"}
    return names


CAUSES = {
    "state-damaged": damage_the_state,
    "image-changed": replace_the_image,
    "size-changed": make_it_longer,
}


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ("raw", "state-damaged"),
        ("qcow2", "state-damaged"),
        ("raw", "image-changed"),
        ("qcow2", "image-changed"),
        ("raw", "size-changed"),
    ],
    indirect=["disk"],
)
def test_all_dirty(disk: KeptDisk, reason: str) -> None:
    cause: Callable[[KeptDisk], None] = CAUSES[reason]
    cause(disk)
    disk.start()
    for name in hear_both(disk, reason, inconsistent=False):
        disk.check_all_dirty(reason, name)
        line = f"bitmap '{name}' of node 'disk' is all dirty: {reason}; the next backup with it"
        assert line in disk.daemon.log()
    # One way out, and the other.
    disk.back_up("incremental")
    assert disk.same_as_target()
    disk.change_bitmap("clear", "c")
    disk.write([7])
    disk.kill()
    disk.start()
    for info in disk.infos().values():
        assert "reason" not in info
        assert info["count"] == info["granularity"]


@pytest.mark.parametrize("disk", ["qcow2"], indirect=True)
def test_inconsistent(disk: KeptDisk) -> None:
    """Without a state directory, after a crash: nobody knows what is dirty."""
    disk.quit()
    disk.start()
    disk.kill()
    shutil.rmtree(disk.state)
    disk.start()
    reason = "crash-unrecoverable"
    for name in hear_both(disk, reason, inconsistent=True):
        assert {"reason": reason, "inconsistent": True}.items() <= disk.infos()[name].items()
        line = f"'{name}' of node 'disk' is inconsistent: {reason}; remove it, and do a full backup"
        assert line in disk.daemon.log()
    with pytest.raises(QmpError, match="'b' is inconsistent and cannot be used"):
        disk.back_up("incremental")
    for name in ("b", "c"):
        disk.change_bitmap("remove", name)
    disk.add_bitmap("b")
    disk.back_up("full")
    disk.kill()
    disk.start()
    disk.check_dirty([])
