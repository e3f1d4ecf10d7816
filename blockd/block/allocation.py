"""What a driver knows about a range without reading it."""

from __future__ import annotations

from typing import NamedTuple

from blockd.extent import Extent


class Allocation(NamedTuple):
    """A run of bytes that is alike: ``zero`` runs read as zeroes and need not be read to know.

    ``depth``: which layer holds it, 1 for this node, 2 for its backing file, and so on; 0 where
    none does, and it reads as zeroes. A hole in a file is held by the file. A driver that only
    passes data on (a filter, ``raw``) is no layer: it gives the depths that it got.
    """

    extent: Extent
    zero: bool
    depth: int = 1

    def moved(self, by_bytes: int) -> Allocation:
        """The same run, that much further on."""
        extent = self.extent
        return self._replace(extent=Extent(extent.offset + by_bytes, extent.length))
