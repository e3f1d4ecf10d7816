"""Which clusters a backup has still to copy, and what became of the others.

Each cluster that the backup wants takes this way; nothing but plain functions moves it on, so
that no guest write can come between a check and the change::

    pending -> reading -> settled, unsaved -> settled
       ^          |
       +----------+  give_back

Settled: a guest may write it, because its old data is in memory or on the target. Unsaved: its
old data is not known to be on the target. ``pending`` is never stored, because to make it from
a large bitmap would take 100 ms at the very instant of the freeze: it is what the bitmap names and
nobody has taken yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.backup.sweep import Sweep
from blockd.bitmap import Bits

#: The most clusters in one step of a walk over all of them; set operations on so many take less
#: than 10 ms, however they are scattered.
_STEP_CLUSTERS = 1 << 16


def runs_of(clusters: BitMap64) -> list[tuple[int, int]]:
    """The runs of clusters next to each other, in order."""
    shifted = clusters.shift(1)
    firsts, ends = (clusters - shifted).to_array(), (shifted - clusters).to_array()
    return list(zip(firsts, ends, strict=True))


class ReadClaim:
    """Clusters from ``first`` up to ``end`` whose old data is being read, by one task."""

    __slots__ = ("_news", "end", "first", "sweep")

    def __init__(self, first: int, end: int, sweep: Sweep | None = None) -> None:
        self.first = first
        self.end = end
        #: The thread that reads them, where one reads many.
        self.sweep = sweep
        self._news: trio.Event | None = None

    async def wait_read(self, cluster: int) -> None:
        """Return when the read has come further or has ended, or when nobody needs to wait."""
        if self._news is None:
            self._news = trio.Event()
        if self.sweep is None or self.sweep.tell_when_read(cluster, self.wake_waiters):
            await self._news.wait()

    def wake_waiters(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


class Clusters:
    """The clusters of one source, and which of them one backup wants.

    A range goes from a first cluster up to, but not including, an end.
    """

    def __init__(self, size_bytes: int, cluster_bytes: int, wanted: Bits | None) -> None:
        """``wanted`` None: all of them. Nobody changes the bits while this object is used."""
        self.size_bytes = size_bytes
        self.cluster_bytes = cluster_bytes
        self.shift = cluster_bytes.bit_length() - 1
        self.count = -(-size_bytes // cluster_bytes)
        self._wanted = wanted

        # Changed by the methods below only.
        #: Includes some that are not wanted, where that was found out.
        self.settled = BitMap64()
        self.reading: dict[int, ReadClaim] = {}
        #: Their old data is not known to be on the target, which may have something else there.
        self.unsaved = BitMap64()
        #: A write of them to the target failed, so what it has there may be neither old nor new.
        self.torn = BitMap64()
        self._given_back: deque[tuple[int, int]] = deque()
        self._concluded = 0
        self._total: int | None = None
        #: How many the backup goes without.
        self.skipped = 0

        #: Set when every wanted cluster is saved or skipped.
        self.finished = trio.Event()
        self._given_back_lot = trio.lowlevel.ParkingLot()

    # -- what is wanted ----------------------------------------------------------------------

    def length(self, first: int, end: int) -> int:
        """The bytes of the range, which the end of the disk may cut short."""
        return min(end << self.shift, self.size_bytes) - (first << self.shift)

    def wants(self, cluster: int) -> bool:
        wanted = self._wanted
        return wanted is None or wanted.intersects(
            cluster << self.shift, self.length(cluster, cluster + 1)
        )

    def count_at_once(self) -> int | None:
        """How many clusters are wanted; None where only a walk over their runs tells."""
        if self._wanted is None:
            return self.count
        if not self._wanted.any():
            return 0
        granularity_bytes = self._wanted.granularity_bytes
        if granularity_bytes < self.cluster_bytes:
            return None
        clusters = self._wanted.count_bytes >> self.shift
        # The last granule may reach beyond the disk's last cluster.
        last = (self.size_bytes - 1) // granularity_bytes * granularity_bytes
        if self._wanted.intersects(last, 1):
            clusters -= ((last + granularity_bytes) >> self.shift) - self.count
        return clusters

    def wanted_runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The runs of wanted clusters within the range, in order, whatever became of them."""
        end = self.count if end is None else end
        if self._wanted is None:
            yield first, end
            return
        after = first
        for extent in self._wanted.extents(first << self.shift, self.length(first, end)):
            start = max(extent.offset >> self.shift, after)
            after = -(-extent.end >> self.shift)
            if start < after:
                yield start, after

    # -- finding work ------------------------------------------------------------------------

    def next_unsettled(self, cluster: int, end: int) -> int:
        """The first cluster of the range that is not settled, or ``end``."""
        settled, step = self.settled, 1
        if cluster not in settled:
            return min(cluster, end)
        while cluster < end:
            if settled.contains_range(cluster, min(cluster + step, end)):
                cluster = min(cluster + step, end)
                step = min(step * 2, _STEP_CLUSTERS)
            elif step == 1:
                break
            else:
                step = 1
        return cluster

    def next_pending(self, cluster: int, end: int) -> tuple[int, int]:
        """The first run of the range that is neither settled nor being read; empty if none is.

        The range lies within one run of wanted clusters.
        """
        while (cluster := self.next_unsettled(cluster, end)) < end:
            claim = self.reading.get(cluster)
            if claim is None:
                break
            cluster = claim.end
        else:
            return end, end
        with suppress(ValueError):
            end = min(end, self.settled.next_set_bit(cluster))
        return cluster, min((taken for taken in self.reading if cluster < taken < end), default=end)

    def pop_given_back(self) -> tuple[int, int] | None:
        """A run that was given back since it was first looked for; it may be settled by now."""
        return self._given_back.popleft() if self._given_back else None

    async def wait_given_back(self) -> None:
        """Return when there may be something to pop."""
        if not self._given_back:
            await self._given_back_lot.park()

    def leave_out(self, first: int, end: int) -> int:
        """Settle what is pending of the range, as not wanted after all; how many clusters."""
        left_out = 0
        while True:
            pending, pending_end = self.next_pending(first, end)
            if pending == pending_end:
                return left_out
            self.settled.add_range(pending, pending_end)
            left_out += pending_end - pending
            first = pending_end

    # -- moving on ---------------------------------------------------------------------------

    def claim(self, first: int, end: int, sweep: Sweep | None = None) -> ReadClaim:
        """Take a pending run, to read it."""
        claim = ReadClaim(first, end, sweep)
        for cluster in range(first, end):
            assert cluster not in self.reading
            self.reading[cluster] = claim
        return claim

    def settle(self, claim: ReadClaim) -> None:
        """The claim's old data is in memory."""
        self.settle_unread(claim.first, claim.end)
        self._end(claim)

    def settle_unread(self, first: int, end: int) -> None:
        """The old data of a pending run is known without reading: zeroes."""
        self.settled.add_range(first, end)
        self.unsaved.add_range(first, end)

    def give_back(self, claim: ReadClaim) -> None:
        """The claim's old data could not be read now: it is pending again."""
        self._end(claim)
        if claim.first < claim.end:
            self._offer(claim.first, claim.end)

    def tear(self, first: int, end: int) -> None:
        """The target refused the old data of a run, and may have taken some of it."""
        self.torn.add_range(first, end)

    def save(self, first: int, end: int) -> None:
        """The old data of a settled run is on the target."""
        self.unsaved.remove_range(first, end)
        self.torn.remove_range(first, end)
        self._conclude(end - first)

    def skip(self, count: int) -> None:
        """The backup goes on without so many settled clusters, which stay unsaved."""
        self.skipped += count
        self._conclude(count)

    def set_total(self, total: int) -> None:
        """Say how many clusters are wanted in all."""
        self._total = total
        self._conclude(0)

    def settle_to(self, claim: ReadClaim, end: int) -> None:
        """The old data of the claim's clusters before ``end`` is in memory; it keeps the rest."""
        if claim.first < end:
            self.settle_unread(claim.first, end)
            for cluster in range(claim.first, end):
                del self.reading[cluster]
            claim.first = end

    def cut(self, claim: ReadClaim, end: int) -> None:
        """The claim's clusters from ``end`` on are pending again; it keeps the others."""
        if end < claim.end:
            for cluster in range(end, claim.end):
                del self.reading[cluster]
            self._offer(end, claim.end)
            claim.end = end

    def _offer(self, first: int, end: int) -> None:
        self._given_back.append((first, end))
        self._given_back_lot.unpark_all()

    def _end(self, claim: ReadClaim) -> None:
        for cluster in range(claim.first, claim.end):
            del self.reading[cluster]
        claim.wake_waiters()

    def _conclude(self, count: int) -> None:
        self._concluded += count
        if self._concluded == self._total:
            self.finished.set()

    # -- what is left ------------------------------------------------------------------------

    def unsaved_runs(self) -> Iterator[list[tuple[int, int]]]:
        """All wanted clusters not known to be on the target, as runs, in steps of bounded work.

        Ask when nothing moves any more.
        """
        for step in self._steps():
            yield runs_of((step - self.settled) | (step & self.unsaved))

    def _steps(self) -> Iterator[BitMap64]:
        """The wanted clusters in order, some at a time."""
        step, runs = BitMap64(), 0
        for first, end in self._short_runs():
            step.add_range(first, end)
            runs += 1
            if runs == limits.BACKUP_SCAN_RUNS or end - step.min() >= _STEP_CLUSTERS:
                yield step
                step, runs = BitMap64(), 0
        yield step

    def _short_runs(self) -> Iterator[tuple[int, int]]:
        for first, end in self.wanted_runs():
            for start in range(first, end, _STEP_CLUSTERS):
                yield start, min(start + _STEP_CLUSTERS, end)
