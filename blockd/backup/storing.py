"""How old data gets onto the target, so that it takes no more room there than it must."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from blockd.backup.clusters import Clusters
from blockd.backup.held import OldData
from blockd.backup.plan import BackupPlan, Sync
from blockd.block import Node


class Storing:
    """Writes to the target; an ``OSError`` is the caller's to deal with."""

    def __init__(
        self, target: Node, clusters: Clusters, plan: BackupPlan, *, stands_on_source: bool
    ) -> None:
        """``stands_on_source``: what the target does not hold, it reads from the source."""
        self._target = target
        self._clusters = clusters
        self._compress = plan.compress
        self._stands_on_source = stands_on_source
        #: The target is read by itself: what it does not hold is zero, and stays so.
        self._alone = plan.sync is Sync.FULL and target.backing is None

    @property
    def by_threads(self) -> bool:
        """Whether a thread may write to the target what ``is_plain``."""
        return not self._compress and self._target.takes_write_by

    def is_plain(self, view: memoryview) -> bool:
        """Whether it is written as it is. Asked in threads."""
        return not self._target.driver.supports_backing or not any(
            run.zero for run in runs_of_zeroes(view, self._clusters.cluster_bytes)
        )

    async def store(self, data: OldData) -> None:
        """Write settled clusters."""
        offset = data.first << self._clusters.shift
        if data.view is None:
            await self._store_zeroes(offset, self._clusters.length(data.first, data.end))
        elif self._compress or self._target.driver.supports_backing:
            await self._store_runs(offset, data.view)
        else:
            await self._target.write(offset, data.view)

    async def _store_runs(self, offset: int, view: memoryview) -> None:
        """To an image, where zeroes take no room: look for clusters of them."""
        for run in runs_of_zeroes(view, self._clusters.cluster_bytes):
            if run.zero:
                await self._store_zeroes(offset + run.start, run.end - run.start)
            elif self._compress:
                await self._target.write_compressed(offset + run.start, view[run.start : run.end])
            else:
                await self._target.write(offset + run.start, view[run.start : run.end])

    async def _store_zeroes(self, offset: int, length: int) -> None:
        """Leave alone what is zero already, so that a sparse target stays sparse.

        But what an image does not hold itself is zero only because of what it is put upon.
        """
        if self._stands_on_source:
            # It may not be zero there for long.
            await self._target.write_zeroes(offset, length, unmap=True)
            return
        end = offset + length
        while offset < end:
            for run in await self._target.allocation(offset, end - offset):
                if not run.zero or (run.depth != 1 and not self._alone):
                    await self._target.write_zeroes(*run.extent, unmap=True)
                offset = run.extent.end


class ZeroRun(NamedTuple):
    """Bytes from ``start`` up to ``end``: whole clusters that are all zero, or that all are not."""

    start: int
    end: int
    zero: bool


def runs_of_zeroes(view: memoryview, cluster_bytes: int) -> Iterator[ZeroRun]:
    """All of ``view``, whose last cluster may be cut short."""
    zeroes = bytes(min(cluster_bytes, len(view)))
    first, zero = 0, False
    for start in range(0, len(view), cluster_bytes):
        cluster = view[start : start + cluster_bytes]
        # Mostly the first byte tells. Comparing bytes is far faster than comparing a memoryview.
        other = cluster[0] == 0 and bytes(cluster) == zeroes[: len(cluster)]
        if start and other != zero:
            yield ZeroRun(first, start, zero)
            first = start
        zero = other
    yield ZeroRun(first, len(view), zero)
