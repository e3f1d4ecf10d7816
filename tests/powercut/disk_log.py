"""What QEMU's ``blklogwrites`` recorded of a disk's writes, and the disk as a power cut leaves it.

The format is that of the kernel's dm-log-writes: a sector with the super block, then entries, each
a sector and the data (Linux, Documentation/admin-guide/device-mapper/log-writes.rst, and
``struct log_write_entry`` in drivers/md/dm-log-writes.c). QEMU makes an entry of a request when it
is sent, so what is behind an entry was sent after whatever had been answered by then.
"""

from __future__ import annotations

import os
import struct
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Iterator
from enum import IntFlag
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.powercut.story import FILE_SYSTEM_BYTES, Mark, unpack_mark

SECTOR_BYTES = 512
SUPER = struct.Struct("<QQQI")
MAGIC = 0x6A736677736872
ENTRY = struct.Struct("<QQQQ")
#: What a disk writes whole or not at all.
PIECE_BYTES = 4096


class Flag(IntFlag):
    FLUSH = 1
    FUA = 2


class Entry(NamedTuple):
    """``place``: of the data in the log; ``offset`` on the disk. In bytes."""

    offset: int
    length: int
    flags: Flag
    place: int


def read_entries(log: int) -> Iterator[Entry]:
    """All that was recorded before the machine was killed, from the file descriptor ``log``."""
    magic, version, _, sector_bytes = SUPER.unpack(os.pread(log, SUPER.size, 0))
    # The number of entries is as old as the last flush.
    assert (magic, version, sector_bytes) == (MAGIC, 1, SECTOR_BYTES)
    size, place = os.fstat(log).st_size, SECTOR_BYTES
    while place + SECTOR_BYTES <= size:
        sector, sectors, flags, _ = ENTRY.unpack(os.pread(log, ENTRY.size, place))
        place += SECTOR_BYTES
        length = sectors * SECTOR_BYTES
        if not (flags or length) or place + length > size:
            return
        # An unknown flag, as that of a discard, is refused here.
        yield Entry(sector * SECTOR_BYTES, length, Flag(flags), place)
        place += length


class DiskLog:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.entries = list(read_entries(self._file))
        #: The indices of the entries.
        self.marks = [i for i, each in enumerate(self.entries) if each.offset >= FILE_SYSTEM_BYTES]
        self.flushes = [i for i, each in enumerate(self.entries) if each.flags & Flag.FLUSH]

    def close(self) -> None:
        os.close(self._file)

    def mark_before(self, end: int) -> Mark:
        """What was known when the last mark before this entry was sent."""
        entry = self.entries[self.marks[bisect_left(self.marks, end) - 1]]
        return unpack_mark(self.data(entry))

    def flushed_before(self, end: int) -> int:
        """The entries before this one were flushed when the power went before ``end``."""
        before = bisect_left(self.flushes, end)
        return self.flushes[before - 1] + 1 if before else 0

    def data(self, entry: Entry) -> bytes:
        return os.pread(self._file, entry.length, entry.place)


class Cut(NamedTuple):
    """The power goes before the entry ``end`` is sent. Of what was not flushed a share, ``kept``,
    has reached the disk.
    """

    end: int
    kept: float


def all_cuts(log: DiskLog, draw: Random) -> list[Cut]:
    """After each flush, without anything later; and somewhere before it, with something."""
    cuts, begin = [], log.marks[0] + 1
    for flush in log.flushes:
        if flush > begin:
            cuts.append(Cut(draw.randint(begin, flush), draw.choice((0, 0.1, 0.5, 0.9, 1))))
            cuts.append(Cut(flush + 1, 0))
            begin = flush + 1
    return cuts


class Replay:
    """Makes disks from the log, in the order of their cuts. ``disk``: as it was at first."""

    def __init__(self, log: DiskLog, disk: Path) -> None:
        self._log = log
        self._disk = disk
        self._flushed = 0

    def make(self, cut: Cut, path: Path, draw: Random) -> None:
        """The disk after this cut; which pieces of what was not flushed it has, is drawn."""
        flushed = self._log.flushed_before(cut.end)
        self._apply(self._disk, self._flushed, flushed)
        self._flushed = flushed
        # A new file: mount(8) takes a loop device over an old one for the same disk still.
        path.unlink(missing_ok=True)
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", self._disk, path], check=True)
        self._apply(path, flushed, cut.end, lambda: draw.random() < cut.kept)

    def _apply(
        self, disk: Path, start: int, end: int, keeps: Callable[[], bool] = lambda: True
    ) -> None:
        file = os.open(disk, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for entry in self._log.entries[start:end]:
                data = self._log.data(entry)
                for at in range(0, entry.length, PIECE_BYTES):
                    if entry.flags & Flag.FUA or keeps():
                        os.pwrite(file, data[at : at + PIECE_BYTES], entry.offset + at)
        finally:
            os.close(file)
