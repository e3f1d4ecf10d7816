"""A guest writes, blockd makes backups meanwhile, and the last one is restored and compared.

How the demo knows what the disk was at the instant of a backup, without asking blockd: the guest is
this program (tests/helpers/logged_guest.py), and its writers log every write that blockd has
acknowledged. A backup is started between two writes: the writers are held, the command is given,
the length of the logs is noted, the writers are let go. What was logged up to that place belongs to
the backup; what comes later does not, though it reaches the disk while the backup is being copied.
Replaying the logs up to there on a copy of the original disk gives what the backup must equal.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.helpers.daemon import Daemon
from tests.helpers.logged_guest import (
    BEGINNING,
    SMALLEST_DISK_BYTES,
    Instant,
    LoggedGuest,
    Write,
)
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient

MIB = 1024 * 1024
BLOCK_BYTES = 4096

DISK = "disk.img"
#: The disk that the demo makes where none is given, and how much of it holds data.
DISK_BYTES = 256 * MIB
DATA_BYTES = 96 * MIB

#: Writes to wait for before each backup.
WRITES_BETWEEN_BACKUPS = 500
#: Files with the disk's data that may exist at one time.
COPIES_OF_THE_DISK = 8


class DemoFailed(Exception):  # noqa: N818 - the demo's result
    """Something is not as blockd promises, or the demo can't be run here."""


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def copy(source: Path, target: Path) -> None:
    """Copy a disk: shared blocks where the file system can, holes where there are zeroes."""
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", source, target], check=True)


def chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            yield chunk


def replay(writes: Iterable[Write], disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        for write in writes:
            os.pwrite(file.fileno(), write.data(), write.offset)


def differing_blocks(one: Iterable[bytes], other: Iterable[bytes]) -> int:
    """How many 4 KiB blocks differ between two disks, byte by byte; a missing one differs."""
    count = 0
    for a, b in itertools.zip_longest(one, other, fillvalue=b""):
        if a != b:
            starts = range(0, max(len(a), len(b)), BLOCK_BYTES)
            count += sum(a[i : i + BLOCK_BYTES] != b[i : i + BLOCK_BYTES] for i in starts)
    return count


def must_be_equal(what: str, one: Iterable[bytes], other: Iterable[bytes]) -> None:
    count = differing_blocks(one, other)
    if count:
        raise DemoFailed(f"{what}: {count} blocks of 4 KiB differ")
    say(f"{what}: equal, every byte")


def witness(program: str, *arguments: str) -> bool:
    """Ask a program that knows nothing of blockd; False where it is not installed."""
    if shutil.which(program) is None:
        say(f"({program} is not installed here: not asked as a second witness)")
        return False
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise DemoFailed(f"{program} says: {result.stdout}{result.stderr}".strip())
    return True


def compare_with_qemu(one: str, other: str) -> None:
    if witness("qemu-img", "compare", "-f", "raw", "-F", "raw", one, other):
        say("qemu-img compare says the same")


class Demo:
    """The story, a method for each step. All files lie in ``directory``, the disk already does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = directory / DISK
        self.size_bytes = self.disk.stat().st_size
        #: What the disk must have been at ``self.instant``.
        self.expected = directory / "expected.img"
        self.backup = directory / "backup.img"
        self.nbd_path = directory / "nbd.sock"
        self.daemon = Daemon(directory)
        self.points: list[Path] = []

    def run(self) -> None:
        copy(self.disk, self.expected)
        try:
            self.start_daemon()
            self.start_guest()
            self.back_up("full", speed=self.size_bytes // 2)
            self.back_up("incremental", speed=self.size_bytes // 8)
            self.back_up("incremental", speed=self.size_bytes // 8)
            self.end_guest()
            self.stop_daemon()
            self.lose_and_restore()
        except BaseException:
            print(f"\nThe log of blockd:\n{self.daemon.log()}", file=sys.stderr)
            raise
        finally:
            if self.daemon.running:
                self.daemon.kill()

    def execute(self, command: str, **arguments: object) -> None:
        """Give blockd a command, and show it as it goes over the socket."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        say(f"{command} {json.dumps(arguments)}".replace(str(self.directory), "$D"))
        self.qmp.execute(command, arguments)

    def start_daemon(self) -> None:
        step("blockd starts, gets the disk, and offers it over NBD")
        self.daemon.start()
        say(f"blockd --qmp unix:$D/{self.daemon.qmp_path.name}")
        # A backup of a large disk takes its time.
        self.qmp = QmpClient(self.daemon.qmp_path, patience_seconds=None)
        file = {"driver": "file", "filename": str(self.disk)}
        self.execute("blockdev-add", driver="raw", node_name="disk", file=file)
        address = {"type": "unix", "data": {"path": str(self.nbd_path)}}
        self.execute("nbd-server-start", addr=address)
        self.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        self.execute("block-dirty-bitmap-add", node="disk", name="since-last")

    def start_guest(self) -> None:
        step("A guest connects and writes, and goes on until the last backup is made")
        self.guest = LoggedGuest(self.nbd_path, "disk", self.size_bytes)
        self.instant = BEGINNING
        self.guest.wait_for_writes(1)
        say("3 writers on 3 connections: 4 to 16 KiB at random places of one eighth of the disk")

    def back_up(self, sync: str, speed: int) -> None:
        name = f"point {len(self.points)}"
        self.guest.wait_for_writes(WRITES_BETWEEN_BACKUPS)
        step(f"Backup, {sync}: {name}")
        arguments = {"sync": sync, "bitmap": "since-last", "bitmap_mode": "on-success"}
        mode = "existing" if self.points else "absolute-paths"
        with self.guest.between_writes() as instant:
            self.execute(
                "drive-backup",
                job_id="backup",
                device="disk",
                target=str(self.backup),
                format="raw",
                mode=mode,
                speed=speed,
                **arguments,
            )
        done = self.qmp.wait_event("BLOCK_JOB_COMPLETED")
        meanwhile = self.guest.now().total - instant.total
        if "error" in done["data"]:
            raise DemoFailed(f"{name}: {done['data']['error']}")
        say(f"{done['data']['offset']:,} bytes copied; the guest wrote {meanwhile} times meanwhile")
        self.keep_point(name, instant)

    def keep_point(self, name: str, instant: Instant) -> None:
        point = self.backup.with_name(f"{name.replace(' ', '-')}.img")
        copy(self.backup, point)
        self.points.append(point)
        replay(self.guest.written(self.instant, instant), self.expected)
        self.instant = instant
        must_be_equal(
            f"{name} and the disk as it was after {instant.total} writes",
            chunks_of(point),
            chunks_of(self.expected),
        )

    def end_guest(self) -> None:
        step("The guest ends: its disk must hold everything that it wrote")
        self.guest.end()
        latest = self.expected.with_name("latest.img")
        copy(self.expected, latest)
        replay(self.guest.written(self.instant, self.guest.now()), latest)
        client = NbdClient.open(str(self.nbd_path), "disk")
        seen = (
            client.read(offset, min(MIB, self.size_bytes - offset))
            for offset in range(0, self.size_bytes, MIB)
        )
        must_be_equal("the disk over NBD and the guest's log", seen, chunks_of(latest))
        client.close()
        uri = f"nbd+unix:///disk?socket={self.nbd_path}"
        compare_with_qemu(uri, str(latest))
        seen_by_nbdcopy = self.directory / "seen.img"
        if witness("nbdcopy", uri, str(seen_by_nbdcopy)):
            must_be_equal("what nbdcopy reads", chunks_of(seen_by_nbdcopy), chunks_of(latest))

    def stop_daemon(self) -> None:
        step("blockd ends")
        self.execute("quit")
        if self.daemon.wait() != 0:
            raise DemoFailed("blockd did not end in order")

    def lose_and_restore(self) -> None:
        step("The disk is lost, and restored from the last point")
        changed = differing_blocks(chunks_of(self.disk), chunks_of(self.points[-1]))
        say(f"since that point the guest had changed {changed} blocks of 4 KiB")
        if not changed:
            raise DemoFailed("nothing was written after the backup began: the demo proves nothing")
        self.disk.unlink()
        say(f"rm $D/{DISK}; cp $D/{self.points[-1].name} $D/{DISK}")
        copy(self.points[-1], self.disk)
        must_be_equal(
            f"the restored disk and the disk as it was after {self.instant.total} writes",
            chunks_of(self.disk),
            chunks_of(self.expected),
        )
        compare_with_qemu(str(self.disk), str(self.expected))


def make_disk(disk: Path) -> None:
    """Data, and holes between the data, as in a disk with file systems on it."""
    data = random.Random(0)
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
        for offset in range(0, DISK_BYTES, 8 * MIB):
            os.pwrite(file.fileno(), data.randbytes(8 * MIB * DATA_BYTES // DISK_BYTES), offset)


def check_image(image: Path) -> None:
    if not image.exists():
        raise DemoFailed(f"{image} does not exist")
    with image.open("rb") as file:
        if file.read(4) == b"QFI\xfb":
            raise DemoFailed(f"{image} is a qcow2 image, and blockd takes raw images only so far")
        size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes < SMALLEST_DISK_BYTES or size_bytes % 512:
        least = SMALLEST_DISK_BYTES // MIB
        raise DemoFailed(f"{image} must have at least {least} MiB, in whole sectors of 512 bytes")


def check_room(directory: Path, data_bytes: int) -> None:
    need, free = COPIES_OF_THE_DISK * data_bytes, shutil.disk_usage(directory).free
    if free < need:
        raise DemoFailed(
            f"{directory} has {free // MIB:,} MiB free, and the demo may need {need // MIB:,}"
        )


def data_bytes(image: Path) -> int:
    """What a sparse copy of the image takes at most."""
    status = image.stat()
    if image.is_file():
        return min(status.st_size, status.st_blocks * 512)
    with image.open("rb") as device:
        return device.seek(0, os.SEEK_END)


@contextlib.contextmanager
def workplace(image: Path | None) -> Iterator[Path]:
    """A directory with room for the demo, deleted afterwards. /tmp may be in memory, so not there.

    For an image it is beside it, where a copy may share the image's blocks.
    """
    place = image.resolve().parent if image is not None and image.is_file() else Path("/var/tmp")
    check_room(place, DATA_BYTES if image is None else data_bytes(image))
    with tempfile.TemporaryDirectory(prefix="blockd-demo-", dir=place) as directory:
        yield Path(directory)
    print(f"\nCleaned up: {directory} is gone.")


def prepare_disk(image: Path | None, directory: Path) -> None:
    step(f"A disk, in $D = {directory}")
    if image is None:
        make_disk(directory / DISK)
        say(f"$D/{DISK}: {DISK_BYTES // MIB} MiB, {DATA_BYTES // MIB} MiB of it data, made now")
    else:
        copy(image, directory / DISK)
        with (directory / DISK).open("rb") as disk:
            os.fsync(disk.fileno())
        say(f"$D/{DISK}: a copy of {image}, which itself is only read")


def tell_to_end(*_: object) -> None:
    raise DemoFailed("ended by a signal")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("image", nargs="?", type=Path, help="raw image or block device; only read")
    image: Path | None = parser.parse_args().image
    signal.signal(signal.SIGTERM, tell_to_end)
    signal.signal(signal.SIGINT, tell_to_end)
    try:
        if image is not None:
            check_image(image)
        with workplace(image) as directory:
            prepare_disk(image, directory)
            Demo(directory).run()
    except Exception as failure:  # noqa: BLE001 - whatever it was, the demo has failed
        print(f"\nFAILED: {str(failure) or repr(failure)}", file=sys.stderr)
        return 1
    print("\nAll as promised.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
