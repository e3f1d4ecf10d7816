"""What a daemon makes of a disk after the power went, held against what is known."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool
from tests.powercut.guest import back_up, node_options
from tests.powercut.story import (
    BITMAP,
    BLOCK_BYTES,
    DISK_BYTES,
    DISKS,
    GRANULE_BYTES,
    REGION_BYTES,
    DiskMark,
    Kind,
    Mark,
    Writer,
    writers,
)

#: ``qemu-img check``: nothing is wrong, or clusters are leaked.
SOUND = {0, 3}

#: The granules that were ever written to, by number.
Image = Mapping[int, bytes]


@contextmanager
def mounted(disk: Path, place: Path) -> Iterator[None]:
    """The file system on the disk; skips the test where the machine lets us mount none."""
    mount = [require_tool("mount"), "-t", "ext4", "-o", "loop", str(disk), str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run([require_tool("umount"), str(place)], check=True)


class Aftermath:
    """One disk. ``figures``: added to; ``broken``: what of the promise is."""

    def __init__(self, place: Path, disk: str, known: DiskMark) -> None:
        self._place = place
        self.disk = disk
        self._writers = list(zip(writers(disk), known.answered, known.since, strict=True))
        self.figures: Counter[str] = Counter()
        self.broken: list[str] = []

    def check_image(self) -> None:
        """Before the daemon has it."""
        if DISKS[self.disk] == "qcow2":
            command = [require_tool("qemu-img"), "check", "-f", "qcow2", "-q"]
            image = self._place / f"{self.disk}.img"
            checked = subprocess.run([*command, str(image)], capture_output=True, check=False)
            if checked.returncode not in SOUND:
                self._break(f"the image is not sound: {checked.stderr.decode()}")

    def check(self, qmp: QmpClient, socket: str) -> None:
        self._check_info(qmp)
        dirty = self._dirty_granules(qmp, socket)
        export = {"type": "nbd", "id": self.disk, "node-name": self.disk}
        qmp.execute("block-export-add", export)
        with NbdClient.open(socket, self.disk) as client:
            image = {
                granule: client.read(granule * GRANULE_BYTES, GRANULE_BYTES)
                for granule in self._touched(GRANULE_BYTES)
            }
        self._check_content(image)
        differing = self._differing(image)
        if missed := differing - dirty:
            self._break(f"changed since the backup, and clean: granules {sorted(missed)}")
        self._check_overshoot(dirty - differing)
        self.figures["dirty granules"] += len(dirty)
        self.figures["changed granules"] += len(differing)
        back_up(qmp, self._place, self.disk)
        if left := self._differing(image):
            self._break(f"the next backup has not made good granules {sorted(left)}")

    def _break(self, what: str) -> None:
        self.broken.append(f"disk {self.disk}: {what}")

    def _check_info(self, qmp: QmpClient) -> None:
        rows = qmp.execute("query-named-block-nodes", {"flat": True})
        (row,) = (row for row in rows if row["node-name"] == self.disk)
        (info,) = row.get("dirty-bitmaps", [{}])
        wanted = {"name": BITMAP, "recording": True, "persistent": True}
        if not (wanted.items() <= info.items()) or {"inconsistent", "reason"} & info.keys():
            self._break(f"the bitmap: {info}")

    # -- the image ---------------------------------------------------------------------------

    def _check_content(self, image: Image) -> None:
        """Each block is as it was told to be durable, or as a later operation left it."""
        for writer, answered, _ in self._writers:
            versions = _versions(writer, answered)
            self.figures["blocks looked at"] += len(versions)
            if wrong := [
                block
                for block, indices in versions.items()
                if not _may_be(_block(image, block), [_content(writer, i, block) for i in indices])
            ]:
                at = min(wrong)
                found = _block(image, at)[:64]
                self._break(f"blocks {wrong}; {at} is {found!r}, not of {versions[at]}")

    def _differing(self, image: Image) -> Set[int]:
        """The granules that are not the same in the backup."""
        target = os.open(self._place / f"{self.disk}.backup", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {
                granule
                for granule, content in image.items()
                if content != os.pread(target, GRANULE_BYTES, granule * GRANULE_BYTES)
            }
        finally:
            os.close(target)

    # -- the bitmap --------------------------------------------------------------------------

    def _dirty_granules(self, qmp: QmpClient, socket: str) -> Set[int]:
        """From an export of its own: nothing else may have the bitmap meanwhile."""
        name = f"{self.disk}-bits"
        # A read-only one can't have a bitmap that records.
        export = {"type": "nbd", "id": name, "node-name": self.disk, "name": name, "writable": True}
        qmp.execute("block-export-add", {**export, "bitmaps": [BITMAP]})
        with NbdClient.open(socket, name, f"qemu:dirty-bitmap:{BITMAP}") as client:
            dirty = set(_read_dirty(client))
        qmp.execute("block-export-del", {"id": name, "mode": "hard"})
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        return dirty

    def _check_overshoot(self, over: Set[int]) -> None:
        """No more than what was armed: a region is, until a checkpoint that follows on one in which
        nobody wrote to it; and the end of each backup has a checkpoint.
        """
        armed = self._touched(REGION_BYTES, since_backups=True)
        each = REGION_BYTES // GRANULE_BYTES
        self.figures["overshoot granules"] += len(over)
        self.figures["armed granules"] += len(armed) * each
        if wrong := {granule for granule in over if granule // each not in armed}:
            self._break(f"dirty without need: granules {sorted(wrong)}")

    def _touched(self, unit_bytes: int, *, since_backups: bool = False) -> Set[int]:
        """By number the units in which anything may have been written, ever or lately."""
        return {
            block * BLOCK_BYTES // unit_bytes
            for writer, answered, since in self._writers
            for index in range(since if since_backups else 0, answered + 1)
            for block in writer.operation(index).blocks()
        }


def _versions(writer: Writer, answered: int) -> dict[int, list[int]]:
    """By block the operations of which its content may be; -1 for the beginning. The first that was
    not answered may have been sent.
    """
    versions: dict[int, list[int]] = {}
    flushed = max((i for i in range(answered) if writer.operation(i).kind is Kind.FLUSH), default=0)
    for index in range(answered + 1):
        operation = writer.operation(index)
        durable = index < flushed or (operation.fua and index < answered)
        for block in operation.blocks():
            if durable:
                versions[block] = [index]
            else:
                versions.setdefault(block, [-1]).append(index)
    return versions


def _may_be(content: bytes, versions: Sequence[bytes]) -> bool:
    """Whether it is one of the versions, or a mixture: a kernel may send a page to the disk while
    the next write to it is under way, which then has not been answered.
    """
    return content in versions or all(
        byte in choices for byte, *choices in zip(content, *versions, strict=True)
    )


def _block(image: Image, block: int) -> bytes:
    granule, inside = divmod(block * BLOCK_BYTES, GRANULE_BYTES)
    return image[granule][inside : inside + BLOCK_BYTES]


def _content(writer: Writer, index: int, block: int) -> bytes:
    return bytes(BLOCK_BYTES) if index < 0 else writer.content(index, block)


def _read_dirty(client: NbdClient) -> Iterator[int]:
    offset = 0
    while offset < DISK_BYTES:
        (runs,) = client.block_status(offset, DISK_BYTES - offset).values()
        for length, flags in runs:
            if flags:
                yield from range(offset // GRANULE_BYTES, (offset + length) // GRANULE_BYTES)
            offset += length


def look_at(disk: Path, place: Path, directory: Path, known: Mark) -> list[Aftermath]:
    """Start a daemon on what is left, in another boot than that which had the disk.

    ``place``: where the guest had mounted it; ``directory``: for the daemon's own files.
    """
    found = [Aftermath(place, name, each) for name, each in known.items()]
    daemon = Daemon(directory, options=["--state-dir", str(place / "state")])
    socket = str(directory / "nbd.sock")
    with mounted(disk, place):
        for each in found:
            each.check_image()
        daemon.start()
        try:
            with QmpClient(daemon.qmp_path) as qmp:
                address = {"type": "unix", "data": {"path": socket}}
                qmp.execute("nbd-server-start", {"addr": address})
                for each in found:
                    qmp.execute("blockdev-add", node_options(place, each.disk))
                    each.check(qmp, socket)
        finally:
            daemon.kill()
    return found
