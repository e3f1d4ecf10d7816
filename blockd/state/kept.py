"""What is stored of a bitmap whose node is open."""

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
