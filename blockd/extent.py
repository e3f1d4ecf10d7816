"""A range of bytes on a node."""

from __future__ import annotations

from typing import NamedTuple


class Extent(NamedTuple):
    """``length`` bytes from ``offset`` on; both in bytes, both at least 0."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.length
