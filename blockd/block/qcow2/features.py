"""What an image's feature bits mean (specification, "Header")."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag

_ENTRY = struct.Struct(">BB46s")


class Incompatible(IntFlag):
    """Whoever does not know one of these must not open the image."""

    #: Refcounts may be wrong; they are to be repaired before the image is written to.
    DIRTY = 1 << 0
    #: Anything may be wrong; the image must not be written to.
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Whoever does not know one of these may ignore it."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Whoever writes to the image without knowing one of these clears it first."""

    #: The bitmaps extension is consistent with the image.
    BITMAPS = 1 << 0
    #: The data file alone, read as a raw image, has the image's content.
    DATA_FILE_RAW = 1 << 1


class CompressionType(IntEnum):
    """How an image's compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


INCOMPATIBLE_MASK = sum(Incompatible)
AUTOCLEAR_MASK = sum(Autoclear)

_INCOMPATIBLE_TYPE = 0

#: (Type, bit, name), as QEMU writes them.
_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)

#: The feature name table's data, for others that read the image.
NAME_TABLE = b"".join(_ENTRY.pack(*entry) for entry in _NAMES)


def describe_unknown(bits: int, table: bytes) -> str:
    """Name the incompatible features ``bits`` by an image's own name table, as QEMU does."""
    named: list[str] = []
    for bit, name in _incompatible_names(table):
        if bits & (1 << bit):
            bits &= ~(1 << bit)
            named.append(name)
    if bits:
        named.append(f"Unknown incompatible feature: {bits:x}")
    return ", ".join(named)


def _incompatible_names(table: bytes) -> Iterator[tuple[int, str]]:
    whole = len(table) - len(table) % _ENTRY.size
    for kind, bit, name in _ENTRY.iter_unpack(table[:whole]):
        text = name.split(b"\0")[0].decode("utf-8", "backslashreplace")
        if kind == _INCOMPATIBLE_TYPE and bit < 64 and text:
            yield bit, text
