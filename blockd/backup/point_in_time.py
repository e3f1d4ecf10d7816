"""The view of a source at the instant of a backup's start: what guests overwrite is kept first."""

from __future__ import annotations

from collections.abc import Callable

import trio

from blockd import limits
from blockd.backup.clusters import Clusters, ReadClaim
from blockd.backup.held import HeldStore, OldData
from blockd.backup.source_map import SourceMap
from blockd.block import Node
from blockd.errors import WouldBlock
from blockd.job import JobError


class PointInTime:
    """The node's hook (``BeforeWrite``) of one backup.

    A guest write to a pending cluster first brings its old data into ``held``, or waits for the
    read of a copy worker that has claimed it. From then on the guest never meets the target.
    Whatever goes wrong breaks the backup, not the guest's write.
    """

    def __init__(
        self,
        source: Node,
        clusters: Clusters,
        held: HeldStore,
        ignore_read_error: Callable[[OSError], bool],
    ) -> None:
        """``ignore_read_error`` says whether the backup goes on without the cluster."""
        self._source = source
        self._clusters = clusters
        self._held = held
        self._ignore_read_error = ignore_read_error
        self._shift = clusters.shift
        self._inline_clusters = limits.INLINE_SAVE_BYTES >> clusters.shift
        self._settled = clusters.settled
        #: Nothing is kept any more: the backup has ended, or is broken.
        self.abandoned = False
        #: Why the backup is broken, once ``broken`` is set.
        self.failure: Exception | None = None
        self.broken = trio.Event()
        #: How many guest writes came by.
        self.writes_seen = 0

    # -- for the node ------------------------------------------------------------------------

    def before_write_nowait(self, offset: int, length: int) -> bool:
        """Every guest write of the hot path asks this, so the common answer comes first."""
        self.writes_seen += 1
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last and first in self._settled:
            return True
        return self.abandoned or self._save_nowait(first, last + 1)

    async def before_write(self, offset: int, length: int) -> None:
        self.writes_seen += 1
        first = offset >> self._shift
        end = (offset + length + self._clusters.cluster_bytes - 1) >> self._shift
        source_map = None
        if end - first >= limits.HOLE_SEARCH_CLUSTERS:
            source_map = SourceMap(self._source, self._clusters.cluster_bytes)
        deadline = trio.current_time() + limits.GUEST_WAIT_FOR_COPY_SECONDS
        for run_first, run_end in self._clusters.wanted_runs(first, end):
            await self._save_run(run_first, run_end, source_map, deadline)

    # -- for the backup ----------------------------------------------------------------------

    def abandon(self) -> None:
        """Keep nothing any more, and let every guest go that waits."""
        self.abandoned = True
        self._held.release_waiters()
        for claim in self._clusters.reading.values():
            claim.wake_waiters()

    # -- inline ------------------------------------------------------------------------------

    def _save_nowait(self, first: int, end: int) -> bool:
        """Make the clusters safe at once, or say that it can't be done so."""
        if end - first > self._inline_clusters:
            return self._settled.contains_range(first, end)
        return all(self._save_one_nowait(cluster) for cluster in range(first, end))

    def _save_one_nowait(self, cluster: int) -> bool:
        clusters = self._clusters
        if cluster in self._settled:
            return True
        claim = clusters.reading.get(cluster)
        if claim is not None and not self._take_back(claim, cluster):
            return False
        if cluster in self._settled:
            return True
        if not clusters.wants(cluster):
            # Remembered, so that the next write there gets its answer from one look.
            self._settled.add(cluster)
            return True
        slot = self._held.take_slot()
        if slot is None:
            return False
        view = self._held.view(slot, clusters.length(cluster, cluster + 1))
        try:
            self._source.read_nowait(cluster << self._shift, view)
        except (WouldBlock, OSError):
            self._held.free(slot)
            return False
        clusters.settle_unread(cluster, cluster + 1)
        self._held.put(slot, OldData(cluster, cluster + 1, view))
        return True

    # -- with waiting ------------------------------------------------------------------------

    async def _save_run(
        self, first: int, end: int, source_map: SourceMap | None, deadline: float
    ) -> None:
        """Make a run of wanted clusters safe, one step at a time."""
        clusters = self._clusters
        await trio.lowlevel.checkpoint()
        while not self.abandoned and (first := clusters.next_unsettled(first, end)) < end:
            claim = clusters.reading.get(first)
            if claim is not None:
                if not self._take_back(claim, first):
                    await claim.wait_read(first)
                continue
            hole_end = await self._find_hole(first, source_map)
            slot = await self._wait_slot(deadline)
            if slot is not None and hole_end > first:
                self._hold_zeroes(slot, first, min(hole_end, end))
            elif slot is not None:
                await self._hold_data(slot, first)

    def _take_back(self, claim: ReadClaim, cluster: int) -> bool:
        """Have a claimed cluster settled or pending at once; False where it is being read."""
        sweep = claim.sweep
        if sweep is None:
            return False
        if sweep.take_from(cluster):
            self._clusters.cut(claim, cluster)
        elif cluster < sweep.read_end:
            self._clusters.settle_to(claim, sweep.read_end)
        else:
            return False
        return True

    async def _find_hole(self, cluster: int, source_map: SourceMap | None) -> int:
        """Where the hole ends that begins at a cluster; the cluster itself where none does."""
        if source_map is None:
            return cluster
        run = source_map.find(cluster)
        if run is None:
            await source_map.ask(cluster)
            run = source_map.find(cluster)
        return run.end if run is not None and run.chosen else cluster

    async def _wait_slot(self, deadline: float) -> int | None:
        """A slot; where the target frees none in time, the backup is broken instead."""
        await trio.lowlevel.checkpoint()
        slot = self._held.take_slot()
        if slot is not None:
            return slot
        with trio.move_on_at(deadline):
            return await self._held.wait_slot()
        seconds = limits.GUEST_WAIT_FOR_COPY_SECONDS
        self._break(
            JobError(f"The target took nothing for {seconds} seconds while a guest's write waited")
        )
        return None

    def _hold_zeroes(self, slot: int, first: int, end: int) -> None:
        """Keep what is pending at the beginning of a run that is a hole in the source."""
        first, end = self._clusters.next_pending(first, end)
        if first == end or self.abandoned:
            self._held.free(slot)
            return
        self._clusters.settle_unread(first, end)
        self._held.put(slot, OldData(first, end, None))

    async def _hold_data(self, slot: int, cluster: int) -> None:
        """Read a cluster's old data into the slot; it may have been taken during the wait."""
        clusters = self._clusters
        if cluster in self._settled or cluster in clusters.reading:
            self._held.free(slot)
            return
        claim = clusters.claim(cluster, cluster + 1)
        view = self._held.view(slot, clusters.length(cluster, cluster + 1))
        try:
            await self._read(cluster << self._shift, view)
        except OSError as error:
            self._held.free(slot)
            self._read_failed(claim, error)
        except BaseException:
            # The guest's write is cancelled, and so it changes nothing.
            self._held.free(slot)
            clusters.give_back(claim)
            raise
        else:
            self._put(slot, claim, view)

    def _put(self, slot: int, claim: ReadClaim, view: memoryview) -> None:
        if self.abandoned:
            # Once guests are let go, what was read may be newer than the start.
            self._held.free(slot)
            self._clusters.give_back(claim)
        else:
            self._clusters.settle(claim)
            self._held.put(slot, OldData(claim.first, claim.end, view))

    async def _read(self, offset: int, view: memoryview) -> None:
        try:
            self._source.read_nowait(offset, view)
        except WouldBlock:
            await self._source.read(offset, view)

    # -- trouble -----------------------------------------------------------------------------

    def _read_failed(self, claim: ReadClaim, error: OSError) -> None:
        """The old data is about to be lost: the backup does without it, or is broken."""
        if self.abandoned:
            self._clusters.give_back(claim)
        elif self._ignore_read_error(error):
            self._clusters.settle(claim)
            self._clusters.skip(claim.end - claim.first)
        else:
            self._clusters.give_back(claim)
            self._break(error)

    def _break(self, failure: Exception) -> None:
        if not self.abandoned:
            self.failure = failure
            self.broken.set()
            self.abandon()
