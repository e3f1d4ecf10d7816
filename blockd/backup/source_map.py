"""What a source's driver knows of it, in whole clusters: such as what need not be read."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from blockd import limits
from blockd.block import Allocation, Node
from blockd.extent import Extent


class Run(NamedTuple):
    """Clusters up to ``end``, all of them chosen or none."""

    end: int
    chosen: bool


def is_zero(run: Allocation) -> bool:
    """Chooses what is known to read as zeroes."""
    return run.zero


def by_clusters(
    allocation: Sequence[Allocation],
    first: int,
    cluster_bytes: int,
    size_bytes: int,
    choose: Callable[[Allocation], bool] = is_zero,
) -> Iterator[Run]:
    """The runs from cluster ``first`` on, where ``allocation`` begins, or a little before.

    A cluster that is chosen only in part is not, nor one about which nothing is said to its end;
    neighbours that are alike are one run. At least one cluster is told of.
    """
    at = first
    other_end = first + 1
    for chosen, alike in itertools.groupby(allocation, choose):
        extent = _whole(alike)
        if not chosen:
            other_end = max(other_end, -(-extent.end // cluster_bytes))
            continue
        start = max(-(-extent.offset // cluster_bytes), first)
        at_disk_end = extent.end >= size_bytes
        end = -(-extent.end // cluster_bytes) if at_disk_end else extent.end // cluster_bytes
        if start < end:
            if at < start:
                yield Run(start, chosen=False)
            yield Run(end, chosen=True)
            at = other_end = end
    if at < other_end:
        yield Run(other_end, chosen=False)


def _whole(runs: Iterable[Allocation]) -> Extent:
    first, *others = runs
    end = others[-1].extent.end if others else first.extent.end
    return Extent(first.extent.offset, end - first.extent.offset)


class SourceMap:
    """Where the source is zero, as its driver said about one stretch of it.

    It stays right for every cluster that is pending, for nobody has written that one since the
    freeze, and it is used for no other.
    """

    def __init__(self, source: Node, cluster_bytes: int) -> None:
        self._source = source
        self._cluster_bytes = cluster_bytes
        self._first = 0
        self._runs: deque[Run] = deque()

    def find(self, cluster: int) -> Run | None:
        """The run of ``cluster``, or None where the source was not asked about it."""
        if cluster < self._first:
            return None
        while self._runs and self._runs[0].end <= cluster:
            self._first = self._runs.popleft().end
        return self._runs[0] if self._runs else None

    async def ask(self, cluster: int) -> None:
        """Ask the source about ``cluster`` and what follows it."""
        offset = cluster * self._cluster_bytes
        size_bytes = self._source.size_bytes
        try:
            allocation = await self._source.allocation(
                offset, min(limits.BACKUP_MAP_BYTES, size_bytes - offset)
            )
        except OSError:
            # Then it is read, and what fails there fails there.
            allocation = ()
        self._first = cluster
        self._runs = deque(by_clusters(allocation, cluster, self._cluster_bytes, size_bytes))
