"""Where a source is known to be zero, in whole clusters, so that it need not be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from blockd import limits
from blockd.block import Allocation, Node


class Run(NamedTuple):
    """Clusters up to ``end`` that are all zero, or that may hold data."""

    end: int
    zero: bool


def by_clusters(
    allocation: Sequence[Allocation], first: int, cluster_bytes: int, size_bytes: int
) -> Iterator[Run]:
    """The runs from cluster ``first`` on, where ``allocation`` begins, or a little before.

    A cluster that is zero only in part holds data, and so does one about which nothing is said
    to its end; neighbours that are alike are one run. At least one cluster is told of.
    """
    at = first
    data_end = first + 1
    for extent, zero, _ in allocation:
        if not zero:
            data_end = max(data_end, -(-extent.end // cluster_bytes))
            continue
        start = max(-(-extent.offset // cluster_bytes), first)
        at_disk_end = extent.end >= size_bytes
        end = -(-extent.end // cluster_bytes) if at_disk_end else extent.end // cluster_bytes
        if start < end:
            if at < start:
                yield Run(start, zero=False)
            yield Run(end, zero=True)
            at = data_end = end
    if at < data_end:
        yield Run(data_end, zero=False)


class SourceMap:
    """What the source's driver said about one stretch of it.

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
