"""Dirty bitmaps: which granules of a node changed since a point in time.

Pure: no clock, no files, no tasks. All calls are plain functions.
"""

from blockd.bitmap.bitmap import DirtyBitmap, Freeze, Pin
from blockd.bitmap.bits import Bits
from blockd.bitmap.format import DamagedPieceError, pack_piece, piece_sum, unpack_piece
from blockd.bitmap.node_bitmaps import BitmapInfo, NodeBitmaps, default_granularity_bytes
from blockd.bitmap.reason import Reason
from blockd.bitmap.states import Frozen, Inconsistent, Pinned, Recording, State, Stopped

__all__ = [
    "BitmapInfo",
    "Bits",
    "DamagedPieceError",
    "DirtyBitmap",
    "Freeze",
    "Frozen",
    "Inconsistent",
    "NodeBitmaps",
    "Pin",
    "Pinned",
    "Reason",
    "Recording",
    "State",
    "Stopped",
    "default_granularity_bytes",
    "pack_piece",
    "piece_sum",
    "unpack_piece",
]
