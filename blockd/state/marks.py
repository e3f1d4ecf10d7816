"""Marks files: which granules of an image were written to in one epoch.

    a sealed ``MarksHeader`` behind a magic of 8 bytes and its length (4 bytes, little-endian),
        padded to whole blocks of 4 KiB: written once, and durable before the epoch begins
    one block of zeroes; anything else in it says that not all writes of the epoch are marked,
        nor their regions armed: "poison"
    one bit for each unit without any mark, the lowest first, padded to whole blocks; no zeroes at
        first, so that a file of which only zeroes are left does not look as if nothing were marked
    units of 512 bytes, none of which lies in two pages: one bit for each granule, the lowest
        first, and a CRC-32 of these bits (4 bytes, little-endian); all zeroes: no marks yet

Marks reach the page cache before the data reaches the image, and are not synced: after a kill they
are all there, after a power cut the armed regions tell instead.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf

import msgspec

from blockd.state.disk import Disk
from blockd.state.records import DamagedError, ImageRecord, seal, unseal

BLOCK_BYTES = 4096
_MAGIC = b"blkdmk\x00\x01"
_LENGTH = struct.Struct("<I")
_SEALED_AT = len(_MAGIC) + _LENGTH.size
_POISON = b"\xff"
#: Marks in a unit, in bytes; and the unit with its sum.
UNIT_MARKS_BYTES = 508
UNIT_BYTES = 512


class MarksHeader(msgspec.Struct, frozen=True):
    """``image`` as it was when the epoch began."""

    image: ImageRecord
    epoch: int
    boot_id: str
    shift: int
    mark_bytes: int

    @property
    def name(self) -> str:
        return marks_name(self.image.row, self.epoch)


def marks_name(image_row: int, epoch: int) -> str:
    return f"{image_row}.{epoch}"


def parse_name(name: str) -> tuple[int, int] | None:
    """The image and the epoch of a marks file; None where it is another one."""
    image, dot, epoch = name.partition(".")
    if dot and image.isdecimal() and epoch.isdecimal():
        return int(image), int(epoch)
    return None


@dataclass(frozen=True, slots=True)
class MarksFile:
    """A marks file that is open, and where its parts begin."""

    header: MarksHeader
    fd: int
    untouched_at: int

    @property
    def units(self) -> int:
        return -(-self.header.mark_bytes // UNIT_MARKS_BYTES)

    @property
    def untouched(self) -> bytes:
        """What says of all units that they have no marks."""
        return b"\xff" * -(-self.units // 8)

    @property
    def units_at(self) -> int:
        return self.untouched_at + -(-len(self.untouched) // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def size_bytes(self) -> int:
        return self.units_at + self.units * UNIT_BYTES


def create(disk: Disk, header: MarksHeader) -> MarksFile:
    """Make the file, durably. Raises ``OSError``; then it may be there or not."""
    sealed = seal(header)
    head = _MAGIC + _LENGTH.pack(len(sealed)) + sealed
    poison_at = -(-len(head) // BLOCK_BYTES) * BLOCK_BYTES
    file = MarksFile(header, -1, poison_at + BLOCK_BYTES)
    fd = disk.create(header.name, file.size_bytes)
    try:
        disk.write(fd, head, 0)
        disk.write(fd, file.untouched, file.untouched_at)
        disk.sync(fd)
        disk.sync_names()
    except BaseException:
        with suppress(OSError):
            disk.close(fd)
        raise
    return replace(file, fd=fd)


def seal_unit(marks: bytes) -> bytes:
    """A unit with these marks."""
    return marks + zlib.crc32(marks).to_bytes(4, "little")


def poison(disk: Disk, name: str) -> None:
    """Say durably that the file does not tell all: inside it, or else by removing it.

    Raises ``OSError`` where neither can be done.
    """
    try:
        with _opened(disk, name) as fd:
            file = _read_header(disk, fd)
            disk.write(fd, _POISON, file.untouched_at - BLOCK_BYTES)
            disk.sync(fd)
    except FileNotFoundError:
        disk.sync_names()
    except (OSError, DamagedError):
        disk.unlink(name)
        disk.sync_names()


def delete(disk: Disk, image_row: int, before: float = inf) -> None:
    """Delete the image's files of epochs before this one; what can't be deleted does no harm."""
    with suppress(OSError):
        for name in disk.names():
            parsed = parse_name(name)
            if parsed is not None and parsed[0] == image_row and parsed[1] < before:
                disk.unlink(name)
        disk.sync_names()


def drop(disk: Disk, name: str) -> None:
    """Keep only the header, of an image that is closed cleanly. Raises ``OSError``."""
    with suppress(DamagedError), _opened(disk, name) as fd:
        disk.truncate(fd, _read_header(disk, fd).untouched_at)


@dataclass(frozen=True, slots=True)
class Marks:
    """What a marks file tells: ``marks`` is None where not all of them are there."""

    header: MarksHeader
    poisoned: bool
    marks: bytes | None

    @property
    def any(self) -> bool:
        """Whether any mark is known."""
        return bool(self.marks and self.marks.strip(b"\0"))


def read(disk: Disk, name: str) -> Marks:
    """Read a whole file. Raises ``OSError``, and ``DamagedError`` where the header is no good."""
    with _opened(disk, name) as fd:
        # An error of the kernel's own writing, which lost marks, comes to light here.
        disk.sync(fd)
        file = _read_header(disk, fd)
        if file.header.name != name:
            raise DamagedError(f"the marks file '{name}' is another's")
        block = disk.read(fd, BLOCK_BYTES, file.untouched_at - BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise DamagedError(f"the marks file '{name}' is cut short")
        return Marks(file.header, block != bytes(BLOCK_BYTES), _read_marks(disk, file))


def _read_marks(disk: Disk, file: MarksFile) -> bytes | None:
    untouched = disk.read(file.fd, file.units_at - file.untouched_at, file.untouched_at)
    units = disk.read(file.fd, file.units * UNIT_BYTES, file.units_at)
    if len(units) < file.units * UNIT_BYTES:
        return None
    nothing, pieces = bytes(UNIT_BYTES), []
    for number in range(file.units):
        unit = units[number * UNIT_BYTES : (number + 1) * UNIT_BYTES]
        marks = unit[:UNIT_MARKS_BYTES]
        pieces.append(marks)
        if unit == nothing:
            if not untouched[number >> 3] >> (number & 7) & 1:
                return None
        elif unit != seal_unit(marks):
            return None
    return b"".join(pieces)[: file.header.mark_bytes]


def read_header(disk: Disk, name: str) -> MarksHeader:
    """Raises ``OSError`` and ``DamagedError``."""
    with _opened(disk, name) as fd:
        return _read_header(disk, fd).header


def _read_header(disk: Disk, fd: int) -> MarksFile:
    head = disk.read(fd, _SEALED_AT, 0)
    if len(head) < _SEALED_AT or not head.startswith(_MAGIC):
        raise DamagedError("not a marks file")
    (length,) = _LENGTH.unpack_from(head, len(_MAGIC))
    header = unseal(disk.read(fd, length, _SEALED_AT), MarksHeader)
    poison_at = -(-(_SEALED_AT + length) // BLOCK_BYTES) * BLOCK_BYTES
    return MarksFile(header, fd, poison_at + BLOCK_BYTES)


@contextmanager
def _opened(disk: Disk, name: str) -> Iterator[int]:
    fd = disk.open(name)
    try:
        yield fd
    finally:
        disk.close(fd)
