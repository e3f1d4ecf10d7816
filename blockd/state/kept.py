"""What is stored of the bitmaps of a node that is open."""

from __future__ import annotations

from dataclasses import dataclass

from blockd.bitmap import DirtyBitmap
from blockd.state.records import BitmapRecord


@dataclass(frozen=True, slots=True)
class Kept:
    """The record, and the bitmap's counts that it is of."""

    record: BitmapRecord
    version: int
    gains: int

    def differs(self, bitmap: DirtyBitmap) -> bool:
        """Whether the bitmap has changed since, but for guest writes."""
        return (
            self.version != bitmap.version
            or self.gains != bitmap.gains
            or self.record.title.recording != bitmap.recording
            or self.record.reason != bitmap.reason
        )


class KeptBitmaps(dict[DirtyBitmap, Kept]):
    """All that are stored, also those which the node has no more."""

    def changed(self, bitmap: DirtyBitmap) -> bool:
        """Whether it is not stored as it is, but for guest writes."""
        kept = self.get(bitmap)
        return kept is None or kept.differs(bitmap)

    def lacks(self, bitmap: DirtyBitmap) -> bool:
        """Whether what is stored, with the marks, may have less than the bitmap."""
        kept = self.get(bitmap)
        return kept is None or kept.gains != bitmap.gains

    @property
    def oldest_epoch(self) -> int:
        """The marks of the epochs from then on are needed."""
        return min((kept.record.epoch for kept in self.values()), default=0)

    def piece_rows(self) -> set[int]:
        """The rows of all pieces."""
        return {ref.row for kept in self.values() for ref in kept.record.pieces}
