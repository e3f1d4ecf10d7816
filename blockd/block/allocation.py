"""What a driver knows about a range without reading it."""

from __future__ import annotations

from typing import NamedTuple

from blockd.extent import Extent


class Allocation(NamedTuple):
    """A run of bytes that is alike: ``zero`` runs read as zeroes and need not be read to know."""

    extent: Extent
    zero: bool
