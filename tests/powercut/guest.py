"""In the guest: a daemon, writers, and backups one after the other, until the power goes.

What was answered is noted on the disk itself, past the file system, before anything else is done.
So whoever has the disk's writes in their order knows of each instant what had been answered.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any

from blockd.__main__ import main as run_daemon
from blockd.nbd.wire import CmdFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient
from tests.powercut.story import (
    BITMAP,
    BLOCK_BYTES,
    DISKS,
    FILE_SYSTEM_BYTES,
    GRANULE_BYTES,
    MARK_BYTES,
    WRITERS_PER_DISK,
    Answered,
    DiskMark,
    Kind,
    Writer,
    pack_mark,
    writers,
)

SCRATCH = Path("/tmp")
#: For an answer: only bounds a hang, in an emulated guest on a busy machine.
PATIENCE_SECONDS = 300


class Marks:
    """The place of the marks. All methods may be called from any thread."""

    def __init__(self, device: str) -> None:
        self._file = os.open(device, os.O_WRONLY | os.O_DIRECT)
        # O_DIRECT wants an aligned buffer.
        self._buffer = mmap.mmap(-1, MARK_BYTES)
        self._lock = threading.Lock()
        nothing = (0,) * WRITERS_PER_DISK
        self._now = {disk: DiskMark([*nothing], [*nothing]) for disk in DISKS}
        self._write()

    def answered(self, writer: Writer, operations: int) -> None:
        with self._lock:
            self._now[writer.disk].answered[writer.number] = operations
            self._write()

    def now(self, disk: str) -> Answered:
        with self._lock:
            return [*self._now[disk].answered]

    def backup_completed(self, disk: str, since: Answered) -> None:
        with self._lock:
            self._now[disk] = self._now[disk]._replace(since=since)
            self._write()

    def _write(self) -> None:
        self._buffer[:] = pack_mark(self._now)
        os.pwrite(self._file, self._buffer, FILE_SYSTEM_BYTES)


def node_options(place: Path, disk: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(place / f"{disk}.img"), "discard": "unmap"}
    return {"driver": DISKS[disk], "node-name": disk, "discard": "unmap", "file": file}


def backup_options(place: Path, disk: str) -> dict[str, Any]:
    """The next backup, to the target that has the ones before it."""
    target = {"target": str(place / f"{disk}.backup"), "mode": "existing", "format": "raw"}
    bitmap = {"sync": "incremental", "bitmap": BITMAP}
    return {"job-id": "backup", "device": disk, **target, **bitmap}


def back_up(qmp: QmpClient, place: Path, disk: str) -> None:
    qmp.execute("drive-backup", backup_options(place, disk))
    done = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert "error" not in done, done


def write(writer: Writer, nbd_path: str, marks: Marks) -> None:
    """Go on until the power goes."""
    with NbdClient.open(nbd_path, writer.disk) as client:
        for index in count():
            operation = writer.operation(index)
            at = operation.first * BLOCK_BYTES
            flags = CmdFlag.FUA if operation.fua else 0
            if operation.kind is Kind.FLUSH:
                client.flush()
            elif operation.kind is Kind.ZERO:
                client.write_zeroes(at, operation.length * BLOCK_BYTES, flags)
            else:
                data = b"".join(writer.content(index, block) for block in operation.blocks())
                client.write(at, data, flags)
            marks.answered(writer, index + 1)


def start_daemon(arguments: list[str]) -> None:
    """In a child that has all its modules already: an emulated guest takes long to load them.

    Return when it says that it takes connections.
    """
    path = str(SCRATCH / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        if not os.fork():
            os.environ["NOTIFY_SOCKET"] = path
            log = os.open(SCRATCH / "blockd.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, sys.stderr.fileno())
            os._exit(run_daemon(arguments))
        while b"READY=1" not in notify.recv(4096).split(b"\n"):
            pass


def set_up(qmp: QmpClient, place: Path, nbd_path: str) -> None:
    qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": nbd_path}}})
    for disk in DISKS:
        qmp.execute("blockdev-add", node_options(place, disk))
        bitmap = {"name": BITMAP, "persistent": True, "granularity": GRANULE_BYTES}
        qmp.execute("block-dirty-bitmap-add", {"node": disk, **bitmap})
        export = {"type": "nbd", "id": disk, "node-name": disk, "writable": True}
        qmp.execute("block-export-add", export)


def back_up_on(qmp: QmpClient, place: Path, marks: Marks) -> None:
    """Go on until the power goes."""
    began = {disk: marks.now(disk) for disk in DISKS}
    for number in count(1):
        for disk in DISKS:
            before, began[disk] = began[disk], marks.now(disk)
            back_up(qmp, place, disk)
            marks.backup_completed(disk, since=before)
        print(f"GUEST: backups {number}", flush=True)


def main(device: str, place: Path) -> None:
    qmp_path, nbd_path = SCRATCH / "qmp.sock", str(SCRATCH / "nbd.sock")
    start_daemon(["--qmp", f"unix:{qmp_path}", "--state-dir", str(place / "state")])
    with QmpClient(qmp_path, patience_seconds=PATIENCE_SECONDS) as qmp:
        set_up(qmp, place, nbd_path)
        marks = Marks(device)
        print("GUEST: ready", flush=True)
        for disk in DISKS:
            for writer in writers(disk):
                threading.Thread(target=write, args=(writer, nbd_path, marks), daemon=True).start()
        back_up_on(qmp, place, marks)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
