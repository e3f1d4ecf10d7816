"""The daemon is ended in the middle of a backup while a guest writes: no byte is lost.

The backup is so slow that it sleeps after its first piece, so the middle is no matter of luck.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.logged_guest import (
    BEGINNING,
    BLOCK_BYTES,
    STRIPE_BYTES,
    STRIPES_FOR_ONE_USED,
    GuestFailed,
    LoggedGuest,
)
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient

KIB = 1024
MIB = 1024 * KIB
DISK_BYTES = 32 * MIB

#: Bytes a second: the pause after the first piece is longer than any test.
SLOW = 1
FULL_SPEED = 0

#: Enough to touch most of what a guest ever writes to.
MANY_WRITES = 200

#: A place after each stripe that the guest uses, which it leaves alone. So if they have changed, a
#: backup that sleeps has still to copy them, whatever the guest's writes have made it save.
PLACES = range(STRIPE_BYTES, DISK_BYTES, STRIPE_BYTES * STRIPES_FOR_ONE_USED)
PLACE_BYTES = 512 * KIB


class Story:
    """A disk with a guest that writes to it, and a daemon that makes backups of it to one file."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.disk = daemon.directory / "disk.img"
        self.target = daemon.directory / "target.img"
        self.mark = daemon.directory / "target.img.blockd-incomplete"
        self.random = random.Random(0)
        #: What is on the disk but for what the guest has written.
        self.content = bytearray(self.random.randbytes(DISK_BYTES))
        self.disk.write_bytes(self.content)

    def give_disk(self, qmp: QmpClient) -> None:
        """Set up a daemon that has just been started, and knows of nothing."""
        self.qmp = qmp
        file = {"driver": "file", "filename": str(self.disk)}
        address = {"type": "unix", "data": {"path": str(self.nbd_path)}}
        export = {"type": "nbd", "id": "disk", "node-name": "disk", "writable": True}
        qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
        qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": "changes"})
        qmp.execute("nbd-server-start", {"addr": address})
        qmp.execute("block-export-add", export)

    @property
    def nbd_path(self) -> Path:
        return self.daemon.directory / "nbd.sock"

    def begin_backup(self, sync: str, speed: int) -> None:
        self.qmp.execute(
            "drive-backup",
            {
                "job-id": "backup",
                "device": "disk",
                "target": str(self.target),
                "format": "raw",
                "mode": "existing" if self.target.exists() else "absolute-paths",
                "sync": sync,
                "bitmap": "changes",
                "bitmap-mode": "on-success",
                "speed": speed,
            },
        )

    def back_up(self, sync: str) -> None:
        self.begin_backup(sync, FULL_SPEED)
        assert "error" not in self.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]

    def reach_the_middle(self, sync: str) -> None:
        """Return when a backup has copied something, has more to copy, and the guest writes on."""
        self.guest = LoggedGuest(self.nbd_path, "disk", DISK_BYTES)
        if sync == "incremental":
            self.back_up("full")
            assert not self.mark.exists()
            self.change_places()
        self.guest.wait_for_writes(MANY_WRITES)
        self.begin_backup(sync, SLOW)
        while not self.in_the_middle():
            pass
        self.guest.wait_for_writes(MANY_WRITES)

    def change_places(self) -> None:
        with NbdClient.open(str(self.nbd_path), "disk") as client:
            for place in PLACES:
                data = self.random.randbytes(PLACE_BYTES)
                client.write(place, data)
                self.content[place : place + PLACE_BYTES] = data

    def in_the_middle(self) -> bool:
        (job,) = self.qmp.execute("query-jobs")
        return bool(0 < job["current-progress"] < job["total-progress"])

    def check_disk_after_end(self) -> None:
        """The daemon has gone. Its file must hold all that it had acknowledged, and else nothing.

        What it had not answered may be there or not, each block for itself.
        """
        with contextlib.suppress(GuestFailed):
            self.guest.end()
        expected = self.content
        for write in self.guest.written(BEGINNING, self.guest.now()):
            expected[write.offset : write.offset + write.length] = write.data()
        actual = self.disk.read_bytes()
        maybe = {
            write.offset + at: write.data()[at : at + BLOCK_BYTES]
            for write in self.guest.unanswered()
            for at in range(0, write.length, BLOCK_BYTES)
        }
        wrong = [
            offset
            for offset in differing_blocks(actual, expected)
            if actual[offset : offset + BLOCK_BYTES] != maybe.get(offset)
        ]
        assert wrong == []


def differing_blocks(one: bytes, other: bytes | bytearray) -> list[int]:
    """Offsets, not contents: of those a failed assertion would be hard to read."""
    assert len(one) == len(other)
    starts = range(0, len(one), BLOCK_BYTES)
    return [at for at in starts if one[at : at + BLOCK_BYTES] != other[at : at + BLOCK_BYTES]]


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_after_a_kill_only_a_full_backup_completes_the_target(daemon: Daemon, sync: str) -> None:
    story = Story(daemon)
    with QmpClient(daemon.qmp_path) as qmp:
        story.give_disk(qmp)
        story.reach_the_middle(sync)
        daemon.kill()
    story.check_disk_after_end()
    assert story.mark.exists()
    assert daemon.qmp_path.exists()

    daemon.start()
    with QmpClient(daemon.qmp_path) as qmp:
        story.give_disk(qmp)
        # This daemon's bitmap has the same name, but does not know what the target lacks.
        story.back_up("incremental")
        assert story.mark.exists()
        story.back_up("full")
    assert not story.mark.exists()
    assert differing_blocks(story.target.read_bytes(), story.disk.read_bytes()) == []


def test_at_sigterm_the_job_is_cancelled_and_everything_ends_in_order(daemon: Daemon) -> None:
    story = Story(daemon)
    with QmpClient(daemon.qmp_path) as qmp:
        story.give_disk(qmp)
        story.reach_the_middle("incremental")
        qmp.events.clear()
        os.kill(daemon.pid, signal.SIGTERM)
        told = [event["data"].get("status", event["event"]) for event in qmp.events_to_the_end()]
        assert daemon.wait() == 0
    cancelled = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    assert told == ["BLOCK_EXPORT_DELETED", *cancelled]
    story.check_disk_after_end()
    assert story.mark.exists()
    assert not daemon.qmp_path.exists()


def test_a_second_daemon_is_refused_and_the_first_lives(daemon: Daemon) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        second = Daemon(daemon.directory)
        with pytest.raises(RuntimeError, match=str(daemon.qmp_path)):
            second.start()
        assert second.wait() == 1
        qmp.execute("query-version")
    with QmpClient(daemon.qmp_path) as qmp:
        qmp.execute("query-version")
