"""The bitmap directory and its tables (specification, "Bitmaps"): bytes to values and back."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import NamedTuple

from blockd import limits
from blockd.block.qcow2.extensions import BitmapsExtension
from blockd.errors import BlockdError

_ENTRY = struct.Struct(">QIIBBHI")
_DIRTY_TRACKING = 1
_GRANULARITY_BITS = range(
    limits.BITMAP_GRANULARITY_MIN_BYTES.bit_length() - 1,
    limits.BITMAP_GRANULARITY_MAX_BYTES.bit_length(),
)
_WORD_BYTES = 8
#: A table's word: an offset, or 0 and whether all bits are set.
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
ALL_ONES = 1


class BitmapFlag(IntFlag):
    """What an entry says of its bitmap."""

    #: It was not stored, so that nobody may rely on what it says.
    IN_USE = 1 << 0
    #: It records writes from the first one on.
    AUTO = 1 << 1
    #: It may be used although its extra data is not understood.
    EXTRA_DATA_COMPATIBLE = 1 << 2


_KNOWN_FLAGS = sum(BitmapFlag)


class TableShape(NamedTuple):
    """How the bits of a bitmap lie in clusters."""

    granules: int
    cluster_size_bytes: int

    @classmethod
    def of(cls, size_bytes: int, granularity_bytes: int, cluster_size_bytes: int) -> TableShape:
        return cls(-(-size_bytes // granularity_bytes), cluster_size_bytes)

    @property
    def granules_per_cluster(self) -> int:
        return self.cluster_size_bytes * 8

    @property
    def words(self) -> int:
        """Entries of the table: clusters of bits."""
        return -(-self.granules // self.granules_per_cluster)


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap, as the directory describes it."""

    name: str
    table_offset: int
    table_words: int
    flags: BitmapFlag
    granularity_bits: int
    extra_data: bytes = b""

    @property
    def granularity_bytes(self) -> int:
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        return BitmapFlag.IN_USE in self.flags

    @property
    def understood(self) -> bool:
        """Whether the bitmap may be used: its extra data, if it has any, does not forbid it."""
        return not self.extra_data or BitmapFlag.EXTRA_DATA_COMPATIBLE in self.flags

    @property
    def nameable(self) -> bool:
        """Whether QMP has words for its name; QEMU takes any bytes."""
        return not any("\ud800" <= character <= "\udfff" for character in self.name)

    def marked_in_use(self) -> BitmapEntry:
        """As it must be while the disk is written to.

        One that nobody here understands stays as it is, unless it should record what is written.
        """
        if not self.understood and BitmapFlag.AUTO not in self.flags:
            return self
        return replace(self, flags=self.flags | BitmapFlag.IN_USE)

    def build(self) -> bytes:
        name = _encode(self.name)
        head = _ENTRY.pack(
            self.table_offset,
            self.table_words,
            self.flags,
            _DIRTY_TRACKING,
            self.granularity_bits,
            len(name),
            len(self.extra_data),
        )
        entry = head + self.extra_data + name
        return entry + bytes(-len(entry) % 8)


def entry_bytes(name: str) -> int:
    """What a bitmap of that name takes in the directory, if it has no extra data."""
    length = _ENTRY.size + len(_encode(name))
    return length + -length % 8


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def build_directory(entries: Iterable[BitmapEntry]) -> bytes:
    return b"".join(entry.build() for entry in entries)


def parse_directory(
    data: bytes, extension: BitmapsExtension, *, size_bytes: int, cluster_size_bytes: int
) -> list[BitmapEntry]:
    """The entries of a directory. ``size_bytes``: the disk's.

    Raises ``BlockdError``, in QEMU's words where it refuses the same.
    """
    if not data:
        raise BlockdError("Requested bitmap directory size is zero")
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    at = 0
    while at < len(data):
        if len(entries) == extension.nb_bitmaps:
            raise BlockdError("More bitmaps found than specified in header extension")
        entry, at = _parse_entry(data, at)
        _check_entry(entry, size_bytes, cluster_size_bytes)
        if entry.name in names:
            raise BlockdError(f"Bitmap '{entry.name}' is twice in the bitmap directory")
        names.add(entry.name)
        entries.append(entry)
    if len(entries) != extension.nb_bitmaps:
        raise BlockdError("Less bitmaps found than specified in header extension")
    return entries


def _parse_entry(data: bytes, at: int) -> tuple[BitmapEntry, int]:
    """An entry, and where the next one starts."""
    start = at + _ENTRY.size
    if start > len(data):
        raise BlockdError("Broken bitmap directory")
    offset, words, flags, kind, bits, name_bytes, extra_bytes = _ENTRY.unpack_from(data, at)
    end = start + extra_bytes + name_bytes
    after = end + -(end - at) % 8
    if after > len(data):
        raise BlockdError("Broken bitmap directory")
    name = data[start + extra_bytes : end].split(b"\0")[0].decode("utf-8", "surrogateescape")
    valid = (
        name
        and not flags & ~_KNOWN_FLAGS
        and kind == _DIRTY_TRACKING
        and bits in _GRANULARITY_BITS
        and name_bytes <= limits.BITMAP_NAME_BYTES
    )
    if not valid:
        raise _invalid(name)
    extra_data = data[start : start + extra_bytes]
    return BitmapEntry(name, offset, words, BitmapFlag(flags), bits, extra_data), after


def _check_entry(entry: BitmapEntry, size_bytes: int, cluster_size_bytes: int) -> None:
    stored_bytes = entry.table_words * cluster_size_bytes
    valid = (
        entry.table_words
        and entry.table_offset
        and entry.table_offset % cluster_size_bytes == 0
        and stored_bytes <= limits.QCOW2_BITMAP_BYTES
    )
    # One in use may be of another size: that of the disk when it was stored.
    fits = entry.in_use or size_bytes <= stored_bytes * 8 << entry.granularity_bits
    if not valid or not fits:
        raise _invalid(entry.name)


def _invalid(name: str) -> BlockdError:
    return BlockdError(f"Bitmap '{name}' doesn't satisfy the constraints")


def parse_table(data: bytes, cluster_size_bytes: int) -> list[int]:
    """A bitmap's table: for each cluster of bits its offset, 0 (no bit is set), or ``ALL_ONES``.

    Raises ``ValueError`` where an entry can't be right.
    """
    words = [word for (word,) in struct.iter_unpack(">Q", data)]
    for word in words:
        if word != ALL_ONES and (word & ~_OFFSET_MASK or word % cluster_size_bytes):
            raise ValueError(f"bitmap table entry {word:#x} is not valid")
    return words


def build_table(words: list[int]) -> bytes:
    return struct.pack(f">{len(words)}Q", *words)


def table_bytes(words: int) -> int:
    """The length of a table with so many entries."""
    return words * _WORD_BYTES
