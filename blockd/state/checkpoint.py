"""Storing bitmaps piece by piece while guests write: nothing is copied, and nobody waits long.

A piece that is taken after the instant of the checkpoint may have marks from after it. They do no
harm: bits only err to dirty, and the marks of the new epoch have them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.bitmap import DirtyBitmap, pack_piece, piece_sum
from blockd.state import changes
from blockd.state.commits import Commits, Pending
from blockd.state.records import BitmapRecord, BitmapTitle, PieceRef


@dataclass(eq=False, slots=True)
class Storing:
    """A bitmap on its way into the database: as it was at the checkpoint's instant.

    ``pieces``: by window; in the beginning those that are stored already and may still be right.
    """

    bitmap: DirtyBitmap
    record: BitmapRecord
    version: int
    gains: int
    windows: Iterator[int]
    pieces: dict[int, PieceRef]
    #: Rows that are of no use once this is stored, and those that are new.
    obsolete: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    @property
    def stale(self) -> bool:
        """Whether the bitmap has changed, so that these pieces are of no use."""
        return self.bitmap.version != self.version

    def next_piece(self, window: int, rows: Iterator[int]) -> tuple[int, bytes] | None:
        """What is to be stored of the window: nothing where it is stored already, or clean.

        Bits that changed by guest writes only have become more, if they are not the same.
        """
        granules = self.bitmap.window(window)
        old = self.pieces.get(window)
        if old is not None and old.count == len(granules):
            return None
        if old is not None:
            self.obsolete.append(old.row)
            del self.pieces[window]
        if not granules:
            return None
        row, piece = next(rows), pack_piece(window, granules)
        self.pieces[window] = PieceRef(window, row, piece_sum(piece), len(granules))
        self.added.append(row)
        return row, piece


def begin_storing(
    bitmap: DirtyBitmap,
    title: BitmapTitle,
    epoch: int,
    old: BitmapRecord | None,
    windows: Iterator[int] | None,
) -> Storing:
    """Store the bitmap as it is now. ``old``: what is stored of it, if guest writes are all that
    came since; ``windows`` of these writes, None for all.
    """
    record = BitmapRecord(title, bitmap.rank, epoch, (), bitmap.reason)
    pieces = {} if old is None else {ref.window: ref for ref in old.pieces}
    if windows is None or old is None:
        windows = iter(range(bitmap.window_count))
    return Storing(bitmap, record, bitmap.version, bitmap.gains, windows, pieces)


async def store_pieces(storing: Storing, commits: Commits, rows: Iterator[int]) -> None:
    """Store what of the bitmap is not stored yet, or stop where it is stale. Raises ``OSError``."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for window in storing.windows:
        if storing.stale:
            return
        if (piece := storing.next_piece(window, rows)) is not None:
            batch.append(piece)
            size += len(piece[1])
        if size >= limits.STATE_BATCH_BYTES or len(batch) >= limits.STATE_BATCH_PIECES:
            await commits.commit(Pending(changes.put_pieces(batch)))
            batch, size = [], 0
        else:
            await trio.lowlevel.checkpoint()
    if batch:
        await commits.commit(Pending(changes.put_pieces(batch)))


def windows_of(regions: BitMap64, region_shift: int, granularity_bytes: int) -> Iterator[int]:
    """The windows of a bitmap in which any of the regions lies, in order."""
    window_bytes = limits.BITMAP_PIECE_GRANULES * granularity_bytes
    region = done = 0
    while True:
        try:
            region = regions.next_set_bit(region)
        except ValueError:
            return
        first, last = region << region_shift, ((region + 1) << region_shift) - 1
        end = last // window_bytes + 1
        yield from range(max(first // window_bytes, done), end)
        done = end
        region = max(region + 1, (done * window_bytes) >> region_shift)
