"""A full backup and incremental ones upon it, as qcow2 files that qemu-img restores."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.guest_disk import GuestDisk
from tests.helpers.qcow2 import check, qemu_img
from tests.helpers.qmp_client import QmpClient

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB
DISK = random.Random(3).randbytes(MIB) + bytes(MIB) + b"t" * MIB + bytes(MIB)


class Disk(GuestDisk):
    """A disk and its backups."""

    def __init__(self, daemon: Daemon, client: QmpClient, content: bytes) -> None:
        super().__init__(daemon, client, content)
        self.backups: list[Path] = []

    def back_up(self, target: Path, **more: Any) -> None:
        self.run("drive-backup", target=str(target), format="qcow2", **more)
        self.backups.append(target)

    def run(self, command: str, **more: Any) -> None:
        arguments = {"job-id": "j", "device": "disk", "bitmap": "b"}
        arguments |= {name.replace("_", "-"): value for name, value in more.items()}
        self.client.execute(command, arguments)
        end = self.client.wait_event("BLOCK_JOB_COMPLETED")
        assert "error" not in end["data"]
        self.client.wait_event("JOB_STATUS_CHANGE", status="null")

    def check_restored(self) -> None:
        """The last backup, with all below it, is the disk, and nobody thinks it incomplete."""
        restored = self.directory / "restored"
        for backup in self.backups:
            check(backup)
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.backups[-1], restored)
        assert restored.read_bytes() == self.image.read_bytes()
        assert not list(self.directory.glob("*.blockd-incomplete"))


@pytest.fixture
def disk(daemon: Daemon) -> Iterator[Disk]:
    with Disk.of(daemon, DISK) as disk:
        yield disk


def make_by_qemu_img(disk: Disk, name: str) -> Path:
    below = disk.backups[-1]
    qemu_img("create", "-f", "qcow2", "-b", below, "-F", "qcow2", disk.directory / name)
    return disk.directory / name


def make_by_blockdev_create(disk: Disk, name: str) -> Path:
    target = disk.directory / name
    place = {"driver": "file", "filename": str(target)}
    image = {"driver": "qcow2", "file": place, "size": SIZE}
    image |= {"backing-file": str(disk.backups[-1]), "backing-fmt": "qcow2"}
    for options in ({**place, "size": 0}, image):
        disk.client.execute("blockdev-create", {"job-id": "c", "options": options})
        disk.client.wait_event("JOB_STATUS_CHANGE", id="c", status="concluded")
        [job] = disk.client.execute("query-jobs")
        assert "error" not in job
        disk.client.execute("job-dismiss", {"id": "c"})
    return target


MAKERS: list[Callable[[Disk, str], Path]] = [make_by_qemu_img, make_by_blockdev_create]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_incrementals_on_overlays(
    disk: Disk,
    make: Callable[[Disk, str], Path],
    compress: bool,
) -> None:
    disk.back_up(disk.directory / "full", sync="full", bitmap_mode="on-success", compress=compress)
    disk.check_restored()
    for number, offset in enumerate((0, MIB + 4096, 3 * MIB), 1):
        disk.guest.write(offset, bytes([number]) * 512)
        disk.guest.write_zeroes(512 * KIB + number * 64 * KIB, 64 * KIB)
        target = make(disk, f"inc{number}")
        disk.back_up(target, sync="incremental", mode="existing", compress=compress)
        disk.check_restored()


def test_incrementals_to_nodes(disk: Disk) -> None:
    disk.back_up(disk.directory / "full", sync="full", bitmap_mode="on-success")
    for number in range(1, 4):
        disk.guest.write(number * 100 * KIB, bytes([number]) * 5000)
        target = make_by_qemu_img(disk, f"inc{number}")
        file = {"driver": "file", "filename": str(target)}
        disk.client.execute("blockdev-add", {"driver": "qcow2", "node-name": "t", "file": file})
        disk.run("blockdev-backup", target="t", sync="incremental")
        disk.client.execute("blockdev-del", {"node-name": "t"})
        disk.backups.append(target)
        disk.check_restored()


def test_incrementals_that_are_put_on_each_other_later(disk: Disk) -> None:
    """What became zero is zero in them, not missing."""
    disk.back_up(disk.directory / "full", sync="full", bitmap_mode="on-success")
    for number in range(1, 3):
        disk.guest.write_zeroes(number * 256 * KIB, 128 * KIB)
        disk.guest.write(2 * MIB, bytes([number]) * 512)
        below, target = disk.backups[-1], disk.directory / f"inc{number}"
        disk.back_up(target, sync="incremental")
        qemu_img("rebase", "-u", "-b", below, "-F", "qcow2", target)
        disk.check_restored()
