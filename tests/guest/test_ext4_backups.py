"""A Linux guest works on its ext4 while backups are made; another one looks at what they hold.

While a backup runs the guest overwrites all of its files; still the backup must hold the round of
before. Some begin in the midst of writes that nobody has synced. They must be what a power cut
leaves: the journal is replayed, the file system is sound, and what had been synced is there.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.guest.machine import Guest, Options, Parts
from tests.helpers.daemon import Daemon
from tests.helpers.qmp_client import QmpClient

MIB = 1024 * 1024
DISK = "disk.img"
DISK_BYTES = 128 * MIB


@pytest.fixture
def parts(tmp_path: Path, pytestconfig: pytest.Config) -> Parts:
    cache = pytestconfig.cache
    assert cache is not None
    return Parts.made_in(tmp_path, cache.mkdir("guest"))


class Point(NamedTuple):
    """A disk of which it is known what a guest must find on it."""

    disk: Path
    #: The number of the last synced round, and the checksum of its checksums.
    round: str
    #: How many files the guest had kept for certain.
    kept: int


class Story:
    """The guest at work, and the daemon that has its disk. Files lie in ``directory``."""

    def __init__(self, directory: Path, qmp: QmpClient, guest: Guest) -> None:
        self.directory = directory
        self.qmp = qmp
        self.guest = guest
        self.points: list[Point] = []
        self.round = ""
        self.kept = 0

    def write_round(self) -> None:
        self.guest.say("round")
        self.round = self.guest.wait_for("synced round ")

    def back_up(self, sync: str) -> None:
        """A backup to a file of its own, during which the guest writes a round."""
        target = self.directory / f"point{len(self.points)}.img"
        if self.points:
            copy(self.points[-1].disk, target)
        point = Point(target, self.round, self.kept)
        self.qmp.execute("drive-backup", drive_backup(sync, target))
        self.write_round()
        self.qmp.execute("block-job-set-speed", {"device": "backup", "speed": 0})
        done = self.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        assert "error" not in done
        assert done["offset"] == done["len"]
        assert self.dirty_bytes() > 0
        self.points.append(point)

    def dirty_bytes(self) -> int:
        """What the guest has changed since the last backup began."""
        nodes: list[dict[str, Any]] = self.qmp.execute("query-named-block-nodes")
        (bitmap,) = next(node for node in nodes if node["node-name"] == "disk")["dirty-bitmaps"]
        count: int = bitmap["count"]
        return count

    def begin_unsynced(self) -> None:
        """Let the guest write without pause, and without syncing most of it."""
        self.guest.say("begin")
        self.guest.wait_for("kept 4")
        self.kept = 5

    def end_unsynced(self) -> None:
        self.guest.say("halt")
        self.guest.wait_for("halted")

    def end(self) -> None:
        """The guest's power goes; what it has synced must be on its own disk too."""
        self.guest.say("end")
        self.guest.wait_end()
        self.points.append(Point(self.directory / DISK, self.round, self.kept))


def drive_backup(sync: str, target: Path) -> Options:
    """A backup so slow that it sleeps after its first piece until it is told to hurry."""
    return {
        "job-id": "backup",
        "device": "disk",
        "target": str(target),
        "format": "raw",
        "mode": "absolute-paths" if sync == "full" else "existing",
        "sync": sync,
        "bitmap": "changes",
        "bitmap-mode": "on-success",
        "speed": 1,
    }


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", source, target], check=True)


def export_disk(qmp: QmpClient, directory: Path) -> Options:
    """Make the disk, and let the daemon offer it; the guest's options for it."""
    disk = directory / DISK
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    server = {"type": "unix", "path": str(directory / "nbd.sock")}
    node = {
        "driver": "raw",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(disk), "discard": "unmap"},
    }
    address = {"type": "unix", "data": {"path": server["path"]}}
    export = {"type": "nbd", "id": "disk", "node-name": "disk", "writable": True}
    qmp.execute("blockdev-add", node)
    qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": "changes"})
    qmp.execute("nbd-server-start", {"addr": address})
    qmp.execute("block-export-add", export)
    return {"driver": "nbd", "server": server, "export": "disk"}


def tell(story: Story) -> None:
    story.guest.wait_for("ready")
    story.write_round()
    story.begin_unsynced()
    story.back_up("full")
    story.back_up("incremental")
    story.end_unsynced()
    story.write_round()
    story.back_up("incremental")
    story.end()


def verify(points: list[Point], parts: Parts) -> None:
    """Restore every point, and boot a guest on each; all at once, which is quicker."""
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(booted(point, parts)) for point in points]
        for point, guest in zip(points, guests, strict=True):
            assert guest.wait_for("found round ") == point.round
            guest.wait_end()


@contextlib.contextmanager
def booted(point: Point, parts: Parts) -> Iterator[Guest]:
    restored = point.disk.with_suffix(".restored")
    copy(point.disk, restored)
    disk = {"driver": "raw", "file": {"driver": "file", "filename": str(restored)}}
    log = restored.with_suffix(".log")
    with Guest(parts, disk, "verify.sh", log, KEPT=point.kept) as guest:
        yield guest


def test_a_fresh_guest_finds_in_each_backup_what_was_written(
    parts: Parts, daemon: Daemon, tmp_path: Path
) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        disk = export_disk(qmp, tmp_path)
        with Guest(parts, disk, "write.sh", tmp_path / "write.log") as guest:
            story = Story(tmp_path, qmp, guest)
            tell(story)
    assert daemon.terminate() == 0
    assert list(tmp_path.glob("*.blockd-incomplete")) == []
    verify(story.points, parts)
