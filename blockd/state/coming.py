"""Bitmaps of one image that are about to be added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockd.block import Coming
from blockd.state.records import BitmapTitle


class ComingBitmaps:
    """What an image's record says of them, so that a crash finds them if storing fails later."""

    def __init__(self, rows: Iterator[int]) -> None:
        self._rows = rows
        self._titles: list[tuple[Coming, BitmapTitle]] = []

    def add(self, coming: Coming) -> None:
        title = BitmapTitle(
            next(self._rows), coming.name, coming.granularity_bytes, recording=True, coming=True
        )
        self._titles.append((coming, title))

    def beside(self, titles: Sequence[BitmapTitle]) -> tuple[BitmapTitle, ...]:
        """The titles of an image that has these."""
        self._titles = [each for each in self._titles if not each[0].over]
        there = {title.name for title in titles}
        return (*titles, *(title for _, title in self._titles if title.name not in there))
