"""Telling somebody that a node fills up."""

from __future__ import annotations

from collections.abc import Callable


class WriteThreshold:
    """One node's: the first write that ends past it is told of, and then it is gone."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        """``on_change`` is called when writes begin, or cease, to be looked at."""
        #: The byte past which somebody wants to hear of a write; 0 for nobody.
        self.offset_bytes = 0
        self._on_change = on_change
        self._tell: Callable[[int], None]

    def watch(self, offset_bytes: int, tell: Callable[[int], None]) -> None:
        """Call ``tell`` before the first write that ends past the offset, with how far past.

        At 0 nothing is watched for from now on. ``tell`` must neither wait nor raise.
        """
        self.offset_bytes, self._tell = offset_bytes, tell
        self._on_change()

    def look(self, end_bytes: int) -> None:
        """A write up to there is about to be done."""
        offset_bytes = self.offset_bytes
        if 0 < offset_bytes < end_bytes:
            self.offset_bytes = 0
            self._on_change()
            self._tell(end_bytes - offset_bytes)
