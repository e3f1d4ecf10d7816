"""The header extensions (specification, "Header extensions"): bytes to values and back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from blockd import limits
from blockd.block.qcow2 import features
from blockd.errors import BlockdError

_PREFIX = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")

#: QEMU gives a format's name a field of this size, the closing NUL included.
_FORMAT_NAME_FIELD_BYTES = 16


class ExtensionType(IntEnum):
    """The kinds that the specification knows; others are kept as they are."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory lies and how large it is; both in bytes."""

    nb_bitmaps: int
    directory_size_bytes: int
    directory_offset: int

    @classmethod
    def parse(cls, data: bytes, cluster_size_bytes: int) -> BitmapsExtension:
        """Raises ``BlockdError``."""
        if len(data) != _BITMAPS.size:
            raise BlockdError("bitmaps_ext: Invalid extension length")
        count, reserved, size, offset = _BITMAPS.unpack(data)
        if reserved:
            raise BlockdError("bitmaps_ext: Reserved field is not zero")
        if count > limits.QCOW2_BITMAPS:
            raise BlockdError(
                f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of "
                f"{limits.QCOW2_BITMAPS}"
            )
        if not count:
            raise BlockdError("found bitmaps extension with zero bitmaps")
        if not offset or offset % cluster_size_bytes:
            raise BlockdError("bitmaps_ext: invalid bitmap directory offset")
        if size > limits.QCOW2_BITMAP_DIRECTORY_BYTES:
            raise BlockdError(
                f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size "
                f"({limits.QCOW2_BITMAP_DIRECTORY_BYTES})"
            )
        return cls(count, size, offset)

    def build(self) -> bytes:
        return _BITMAPS.pack(self.nb_bitmaps, 0, self.directory_size_bytes, self.directory_offset)


@dataclass(frozen=True, slots=True)
class Extensions:
    """What an image's extensions say. The feature names are not here: they are the same always."""

    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: BitmapsExtension | None = None
    #: Bitmaps were there, but somebody wrote to the image without keeping them up to date. So this
    #: header differs from the one for writing, which is written in its place.
    stale_bitmaps: bool = False
    #: (Type, data) of those that the specification does not know.
    unknown: tuple[tuple[int, bytes], ...] = ()

    @classmethod
    def parse(cls, area: bytes, *, cluster_size_bytes: int, bitmaps_consistent: bool) -> Extensions:
        """Read the bytes between the header and the backing file's name (or the cluster's end).

        Raises ``BlockdError``.
        """
        known: dict[int, bytes] = {}
        unknown: list[tuple[int, bytes]] = []
        for kind, data in split(area):
            if kind in known or any(kind == other for other, _ in unknown):
                raise BlockdError(f"Header extension 0x{kind:08x} appears more than once")
            if kind in ExtensionType.__members__.values():
                known[kind] = data
            else:
                unknown.append((kind, data))
        if ExtensionType.CRYPTO in known:
            raise BlockdError("CRYPTO header extension only expected with LUKS encryption method")
        bitmaps = known.get(ExtensionType.BITMAPS)
        usable = bitmaps if bitmaps_consistent else None
        return cls(
            backing_format=_format_name(known.get(ExtensionType.BACKING_FORMAT)),
            data_file=to_text(known.get(ExtensionType.DATA_FILE, b"")),
            bitmaps=None if usable is None else BitmapsExtension.parse(usable, cluster_size_bytes),
            stale_bitmaps=bitmaps is not usable,
            unknown=tuple(unknown),
        )

    def build(self, *, with_names: bool) -> bytes:
        """The area's bytes, in QEMU's order, the end mark included."""
        parts: list[tuple[int, bytes]] = []
        if self.backing_format is not None:
            parts.append((ExtensionType.BACKING_FORMAT, to_bytes(self.backing_format)))
        if self.data_file is not None:
            parts.append((ExtensionType.DATA_FILE, to_bytes(self.data_file)))
        if with_names:
            parts.append((ExtensionType.FEATURE_NAMES, features.NAME_TABLE))
        if self.bitmaps is not None:
            parts.append((ExtensionType.BITMAPS, self.bitmaps.build()))
        parts += [*self.unknown, (ExtensionType.END, b"")]
        return b"".join(
            _PREFIX.pack(kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in parts
        )


def split(area: bytes) -> Iterator[tuple[int, bytes]]:
    """Each extension's type and data, up to the end mark. Raises ``BlockdError``."""
    at = 0
    while at < len(area):
        start = at + _PREFIX.size
        if start > len(area):
            raise BlockdError("Header extension too large")
        kind, length = _PREFIX.unpack_from(area, at)
        if length > len(area) - start:
            raise BlockdError("Header extension too large")
        if kind == ExtensionType.END:
            return
        yield kind, area[start : start + length]
        at = start + length + -length % 8


def to_text(name: bytes) -> str | None:
    """A name in an image, which ends at a NUL as QEMU reads it; None where it is empty.

    It is a file name in whatever encoding, so no byte of it gets lost.
    """
    return name.split(b"\0")[0].decode("utf-8", "surrogateescape") or None


def to_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _format_name(name: bytes | None) -> str | None:
    if name is None:
        return None
    if len(name) >= _FORMAT_NAME_FIELD_BYTES:
        raise BlockdError(
            f"ERROR: ext_backing_format: len={len(name)} too large (>={_FORMAT_NAME_FIELD_BYTES})"
        )
    return to_text(name)
