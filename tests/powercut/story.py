"""What is known of the writers in the guest: what each of them does, and how far it had come.

Both sides have this: the guest, which does it, and the host, which looks at what is left of it.
What a writer does follows from its number alone, so nothing but counts has to be told.
"""

from __future__ import annotations

import json
from enum import Enum
from random import Random
from typing import Any, NamedTuple

MIB = 1 << 20
BLOCK_BYTES = 4096
GRANULE_BYTES = 64 << 10
REGION_BYTES = 16 * MIB
DISK_BYTES = 256 * MIB

#: The guest's disk: a file system, and behind it the place of the marks.
FILE_SYSTEM_BYTES = 320 * MIB
MARK_BYTES = 4096
GUEST_DISK_BYTES = FILE_SYSTEM_BYTES + MIB

#: By the name of node, export and files: the format.
DISKS = {"a": "raw", "b": "qcow2"}
BITMAP = "changes"

#: Each has its own regions, so that the order of writes to one place is that of one writer.
WRITERS_PER_DISK = 2
#: In the first half of each so many operations only: in the other, what was written is at risk for
#: longer than some backups take.
CYCLE = 200
FLUSH_CHANCES = (0.15, 0.01)
FUA_CHANCE = 0.05
#: A writer stays in a region for so many operations; the granules of a region that it writes to.
STAY = 30
GRANULES_PER_REGION = 8


class Kind(Enum):
    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"


class Operation(NamedTuple):
    """In blocks; a flush has none. ``fua``: it is durable when it is answered."""

    kind: Kind
    first: int = 0
    length: int = 0
    fua: bool = False

    def blocks(self) -> range:
        return range(self.first, self.first + self.length)


class Writer:
    """All that it will ever do, drawn as it is asked for."""

    def __init__(self, disk: str, number: int) -> None:
        self.disk = disk
        self.number = number
        self._random = Random(f"{disk}{number}")
        self._operations: list[Operation] = []
        self._region = 0

    def operation(self, index: int) -> Operation:
        while len(self._operations) <= index:
            self._operations.append(self._draw())
        return self._operations[index]

    def content(self, index: int, block: int) -> bytes:
        """Of a block, after this operation of the writer."""
        if self.operation(index).kind is Kind.ZERO:
            return bytes(BLOCK_BYTES)
        return _stamped(f"{self.disk}{self.number} {index:10} {block:10}")

    def _draw(self) -> Operation:
        draw = self._random
        if len(self._operations) % STAY == 0:
            regions = DISK_BYTES // REGION_BYTES // WRITERS_PER_DISK
            self._region = draw.randrange(regions) * WRITERS_PER_DISK + self.number
        flushes = len(self._operations) % CYCLE < CYCLE // 2
        if draw.random() < FLUSH_CHANCES[self.number] and flushes:
            return Operation(Kind.FLUSH)
        kind = Kind.ZERO if draw.random() < 0.1 else Kind.WRITE
        granule = draw.randrange(GRANULES_PER_REGION) * 7
        at = self._region * REGION_BYTES + granule * GRANULE_BYTES
        length = draw.randrange(1, 5)
        inside = draw.randrange(GRANULE_BYTES // BLOCK_BYTES - length)
        fua = draw.random() < FUA_CHANCE and flushes
        return Operation(kind, at // BLOCK_BYTES + inside, length, fua)


def _stamped(stamp: str) -> bytes:
    return stamp.encode().ljust(32).ljust(64, b".") * (BLOCK_BYTES // 64)


def writers(disk: str) -> list[Writer]:
    return [Writer(disk, number) for number in range(WRITERS_PER_DISK)]


#: How many operations each writer of a disk had got the answer to; the next may have been sent.
Answered = list[int]


class DiskMark(NamedTuple):
    """``since``: where the writers were when the last backup but one began, of the backups that had
    been told to be complete.
    """

    answered: Answered
    since: Answered


#: By disk, what was known when the mark was written.
Mark = dict[str, DiskMark]


def pack_mark(mark: Mark) -> bytes:
    return (
        json.dumps({disk: each._asdict() for disk, each in mark.items()}).encode().ljust(MARK_BYTES)
    )


def unpack_mark(data: bytes) -> Mark:
    members: dict[str, dict[str, Any]] = json.loads(data)
    return {disk: DiskMark(**each) for disk, each in members.items()}
