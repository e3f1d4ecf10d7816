"""Image fleecing: the target stands on the source, and is read while the source is written.

What the target does not hold yet it reads from the source. So while its reader is on the way to
the source, a guest may overwrite what it is about to find there; and old data that is still in
memory is neither here nor there. What is in place of the target's driver for readers sees to that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from pyroaring import BitMap64

from blockd.backup.clusters import Clusters
from blockd.backup.held import HeldStore, OldData
from blockd.block import Allocation, Node, ReadView
from blockd.extent import Extent


def stands_on(node: Node, other: Node) -> bool:
    """Whether ``node`` may read what it reads from ``other``."""
    children = node.driver.children.values()
    return any(child is other or stands_on(child, other) for child in children)


class _Place(Enum):
    """Where a cluster's old data is."""

    #: With the source, where the target looks for it too.
    UNTOUCHED = auto()
    #: With the source; what the target has is of no use, for a copy is under way there or failed.
    TORN = auto()
    HELD = auto()
    TARGET = auto()


class _Run(NamedTuple):
    """Bytes up to ``end`` that are in one place."""

    end: int
    place: _Place
    held: OldData | None = None


class FleecingView:
    """What a target of old data reads as (``ReadView``): its source, as it was at the instant.

    No guest waits for a reader: nobody writes to a cluster before it is settled, so a cluster
    that is not settled after it was read was read right, and any other is read again.
    """

    def __init__(
        self,
        source: Node,
        target: Node,
        clusters: Clusters,
        held: HeldStore | None,
        is_over: Callable[[], bool],
    ) -> None:
        """``held``: what is on its way to the target in memory. ``is_over``: nothing is kept."""
        self._source = source
        self._target = target
        self._clusters = clusters
        self._shift = clusters.shift
        self._held = held
        self._is_over = is_over

    async def read(self, offset: int, view: memoryview) -> None:
        """As ``Driver.read``; EIO once old data is lost."""
        at, end = offset, offset + len(view)
        while at < end:
            run = self._find(at, end)
            piece = view[at - offset : run.end - offset]
            if run.held is None:
                await self._holder(run).read(at, piece)
            else:
                run.held.read(at - (run.held.first << self._shift), piece)
            if self._is_right(at, run):
                at = run.end

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        """As ``Driver.allocation``; what is held is as good as allocated."""
        while True:
            run = self._find(offset, offset + length)
            extent = Extent(offset, run.end - offset)
            if run.held is None:
                allocation = await self._holder(run).allocation(*extent)
            else:
                allocation = [Allocation(extent, zero=run.held.view is None)]
            if self._is_right(offset, run):
                return allocation

    def _holder(self, run: _Run) -> ReadView:
        return self._source if run.place is _Place.TORN else self._target.driver

    def _find(self, offset: int, end: int) -> _Run:
        """The run that begins at ``offset``."""
        self._check_going_on()
        first = offset >> self._shift
        place, stop = self._place(first, -(-end >> self._shift))
        held = None
        if place is _Place.HELD:
            held = None if self._held is None else self._held.find(first)
            if held is None:
                # The backup went without it.
                raise _lost()
            stop = held.end
        return _Run(min(stop << self._shift, end), place, held)

    def _place(self, cluster: int, end: int) -> tuple[_Place, int]:
        """Where a cluster is, and the clusters behind it up to which others are there too."""
        settled, unsaved = self._clusters.settled, self._clusters.unsaved
        match cluster in settled, cluster in unsaved:
            case False, False:
                return _Place.UNTOUCHED, _next(unsaved, cluster, _next(settled, cluster, end))
            case False, True:
                return _Place.TORN, cluster + 1
            case True, True:
                return _Place.HELD, cluster + 1
        return _Place.TARGET, _next(unsaved, cluster, self._clusters.next_unsettled(cluster, end))

    def _is_right(self, offset: int, run: _Run) -> bool:
        """Whether what was read of the run is of the instant: it was there all the time."""
        self._check_going_on()
        if run.place in (_Place.HELD, _Place.TARGET):
            return True
        end = -(-run.end >> self._shift)
        return self._place(offset >> self._shift, end) == (run.place, end)

    def _check_going_on(self) -> None:
        if self._is_over():
            raise _lost()


class LostInstant:
    """What a target reads as whose instant was lost: not at all (``ReadView``).

    For what its reader got so far is no part of what it would get now.
    """

    async def read(self, offset: int, view: memoryview) -> None:
        raise _lost()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        raise _lost()


def _next(clusters: BitMap64, first: int, end: int) -> int:
    """The next of ``clusters`` from ``first`` on, or ``end``."""
    try:
        return int(min(clusters.next_set_bit(first), end))
    except ValueError:
        return end


def _lost() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))
