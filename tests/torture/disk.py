"""One disk of the torture: its image, its writer, its bitmaps, and its backup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroaring import BitMap

from tests.helpers.qcow2 import qemu_img
from tests.torture.model import BitmapModel, Content, Model
from tests.torture.write_log import BLOCK_BYTES, WriteLog

MIB = 1 << 20
DISK_BYTES = 256 * MIB
#: The bitmap from which backups are made.
MAIN = "main"


class Disk:
    """``name`` is that of its node, its export and its files; ``driver``: raw or qcow2."""

    def __init__(self, directory: Path, name: str, driver: str, seed: int) -> None:
        self.name = name
        self.driver = driver
        self.directory = directory
        self.image = directory / f"{name}.{driver}"
        self.target = directory / f"{name}.backup"
        for path, format_ in ((self.image, driver), (self.target, "raw")):
            qemu_img("create", "-f", format_, path, str(DISK_BYTES))
        self.log = WriteLog(directory, name)
        self.bitmaps: dict[str, BitmapModel] = {}
        #: The first write that the bitmaps were not looked at with.
        self.base = 0
        #: The daemon has the node for the target of a backup that has ended.
        self.target_open = False
        self._written = BitMap()
        self._written_to = 0
        self._writing = False
        self._writer = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.writer", str(directory), name, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def options(self) -> dict[str, Any]:
        file = {"driver": "file", "filename": str(self.image)}
        return {"driver": self.driver, "node-name": self.name, "discard": "unmap", "file": file}

    def target_options(self, bad_sector: int | None) -> dict[str, Any]:
        """``bad_sector``: it can't be written, once."""
        file: dict[str, Any] = {"driver": "file", "filename": str(self.target)}
        if bad_sector is not None:
            fault = {"event": "none", "iotype": "write", "sector": bad_sector, "once": True}
            file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
        return {"driver": "raw", "node-name": f"{self.name}-target", "file": file}

    # -- its writer --------------------------------------------------------------------------

    def write_on(self, socket: Path) -> None:
        """Let the guest begin."""
        assert not self._writing
        self._writing = True
        self._tell(f"go {socket} {self.name} {DISK_BYTES}")

    def write_no_more(self) -> None:
        """Return when the guest has ended, because it is told to or because the daemon has."""
        if self._writing:
            self._tell("stop")
            assert self._writer.stdout is not None
            answer = self._writer.stdout.readline()
            assert answer in {"gone\n", "stopped\n"}, f"the writer of {self.name} failed"
            self._writing = False

    def _tell(self, line: str) -> None:
        assert self._writer.stdin is not None
        self._writer.stdin.write(line + "\n")
        self._writer.stdin.flush()

    def close(self) -> None:
        assert self._writer.stdin is not None
        self._writer.stdin.close()
        self._writer.wait()
        assert self._writer.stdout is not None
        self._writer.stdout.close()
        self.log.close()

    # -- what is known of it -----------------------------------------------------------------

    def before(self) -> int:
        """The moment before a command: ``Moment.before``."""
        return self.log.unanswered_from(self.base)

    @contextmanager
    def content(self, socket: Path) -> Iterator[Content]:
        """What the disk holds, while no guest writes, from an export of it."""
        path = self.image
        if self.driver != "raw":
            path = self.directory / f"{self.name}.content"
            path.unlink(missing_ok=True)
            copy = ["nbdcopy", self._uri(socket), str(path)]
            subprocess.run(copy, check=True, capture_output=True)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield lambda block: os.pread(file, BLOCK_BYTES, block * BLOCK_BYTES)
        finally:
            os.close(file)

    def differing_from_backup(self, content: Content) -> BitMap:
        """The blocks whose content is not that of the target."""
        end = self.log.count()
        for _, write, _ in self.log.entries(self._written_to, end):
            self._written.add_range(write.blocks().start, write.blocks().stop)
        self._written_to = end
        target = os.open(self.target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return BitMap(
                block
                for block in self._written
                if os.pread(target, BLOCK_BYTES, block * BLOCK_BYTES) != content(block)
            )
        finally:
            os.close(target)

    def dirty_blocks(self, socket: Path, bitmap: str) -> BitMap:
        """What a bitmap says, from an export that has it."""
        command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", self._uri(socket)]
        runs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        dirty = BitMap()
        for run in runs:
            if run["type"] & 1:
                end = -(-(run["offset"] + run["length"]) // BLOCK_BYTES)
                dirty.add_range(run["offset"] // BLOCK_BYTES, end)
        return dirty

    def _uri(self, socket: Path) -> str:
        return f"nbd+unix:///{self.name}-check?socket={socket}"

    def begin_anew(self, bitmap: BitmapModel, recording: bool, dirty: BitMap) -> None:
        """From now on the bitmap is known to be this."""
        bitmap.model = Model(recording, dirty, dirty, self.base, self.base)
        bitmap.job = bitmap.command = None
        bitmap.may_be_gone = False
