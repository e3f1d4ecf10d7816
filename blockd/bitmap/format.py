"""Pieces: how windows of a bitmap are kept in a store.

A piece is the dirty granules of one window of ``BITMAP_PIECE_GRANULES``, in the library's portable
form ("RoaringFormatSpec") behind a header of 24 bytes, little-endian:

    8  magic, with the version of this format
    8  number of the window
    4  length of what follows the header
    4  CRC-32 of the header up to here and of what follows it

The library accepts damaged bytes, and may read beyond them, so it sees only what the sum covers.
A window with nothing dirty has no piece.
"""

from __future__ import annotations

import struct
import zlib

from pyroaring import BitMap64

from blockd import limits

_MAGIC = b"blkdpc\x00\x02"
_HEADER = struct.Struct("<8sQI")
_SUM = struct.Struct("<I")
_DATA_AT = _HEADER.size + _SUM.size


class DamagedPieceError(Exception):
    """What is stored is not what was."""


def pack_piece(window: int, granules: BitMap64) -> bytes:
    """The piece of a window; ``granules`` lie in it, and are changed in form only."""
    granules.run_optimize()
    data = granules.serialize()
    header = _HEADER.pack(_MAGIC, window, len(data))
    return b"".join((header, _SUM.pack(zlib.crc32(data, zlib.crc32(header))), data))


def unpack_piece(window: int, piece: bytes) -> BitMap64:
    """The granules that ``pack_piece`` was given. Raises ``DamagedPieceError``."""
    if piece[: _HEADER.size] != _HEADER.pack(_MAGIC, window, max(len(piece) - _DATA_AT, 0)):
        raise DamagedPieceError(f"the piece of window {window} is not one")
    data = piece[_DATA_AT:]
    if piece_sum(piece) != zlib.crc32(data, zlib.crc32(piece[: _HEADER.size])):
        raise DamagedPieceError(f"the piece of window {window} is damaged")
    granules: BitMap64 = BitMap64.deserialize(data)
    return granules


def piece_sum(piece: bytes) -> int:
    """The sum within a piece, which tells it from the others of its window."""
    sums: int = _SUM.unpack_from(piece, _HEADER.size)[0]
    return sums


def window_count(granule_count: int) -> int:
    """How many windows so many granules have."""
    return -(-granule_count // limits.BITMAP_PIECE_GRANULES)
