"""The tasks that bring the source's old data to the target."""

from __future__ import annotations

import errno
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import trio

from blockd import limits
from blockd.backup.clusters import Clusters, ReadClaim
from blockd.backup.feeder import Feeder, Piece
from blockd.backup.fleecing import FleecingView, LostInstant, stands_on
from blockd.backup.held import HeldStore, OldData
from blockd.backup.plan import BackupPlan, Sync
from blockd.backup.point_in_time import PointInTime
from blockd.backup.source_discard import SourceDiscard
from blockd.backup.source_map import SourceMap
from blockd.backup.storing import Storing
from blockd.backup.sweep import Sweep, Swept
from blockd.backup.top_layer import leave_out_lower_layers
from blockd.block import Descriptor, Node
from blockd.job import ErrorAction, IoStatus, Job, OnError, action_on_error

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnErrors:
    """What the user wants to happen when the source, or the target, fails."""

    source: OnError = OnError.REPORT
    target: OnError = OnError.REPORT


class Copier:
    """Copies for one job, in two ways at once.

    Workers go through what is pending; they keep to the job's speed and pauses. Writers empty
    the held store at once, even while the job is paused, because guests may be waiting for room.
    An ``OSError`` that the user's policy does not bear ends ``run``.
    """

    def __init__(
        self,
        job: Job,
        source: Node,
        target: Node,
        clusters: Clusters,
        on_errors: OnErrors,
        *,
        plan: BackupPlan,
    ) -> None:
        self._job = job
        self._source = source
        self._target = target
        self._clusters = clusters
        self._on_errors = on_errors
        self._background = plan.sync is not Sync.NONE
        self._top_only = plan.sync is Sync.TOP
        self._workers = min(plan.max_workers, limits.BACKUP_WORKERS)
        #: Clusters that one copy of the background has at the most.
        self._max_chunk = (
            clusters.count
            if plan.max_chunk_bytes is None
            else plan.max_chunk_bytes >> clusters.shift
        )
        self._held = HeldStore(clusters.cluster_bytes)
        #: What the target does not hold, it reads from the source.
        self._stands_on_source = stands_on(target, source)
        self._storing = Storing(target, clusters, plan, stands_on_source=self._stands_on_source)
        self._feeder = Feeder(clusters, SourceMap(source, clusters.cluster_bytes))
        #: The hook to put into the source at the instant of the start.
        self.hook = PointInTime(source, clusters, self._held, self._ignore_guest_read_error)
        #: Another hook, to be put there before, where what was copied is to be discarded.
        self.discard = (
            SourceDiscard(job.id, source, target, clusters) if plan.discard_source else None
        )
        self._writes_seen = 0
        self._guests_idle_from = 0.0
        self._step = self._at_most(limits.BACKUP_STEP_BYTES)
        #: A sweep met an error that it could not tell, or could not begin.
        self._sweep_failed = False

    def show_instant(self) -> None:
        """Let the target's readers see the source as it is now, where they see the source.

        Only where there is no background, whose buffers nobody looks into.
        """
        if self._stands_on_source and not self._background:
            view = FleecingView(
                self._source, self._target, self._clusters, self._held, lambda: self.hook.abandoned
            )
            self._target.show(view)

    def hide_instant(self, *, lost: bool) -> None:
        """Take that back. ``lost``: its readers may not take for it what the target has now."""
        if self._stands_on_source and not self._background:
            self._target.show(LostInstant() if lost else None)

    async def run(self) -> None:
        """Return once everything is on the target, or is skipped; never without a background."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._let_guests_go_at_the_end)
                for _ in range(limits.HELD_WRITERS):
                    nursery.start_soon(self._write_held)
                if self.discard is not None:
                    nursery.start_soon(self.discard.run)
                if self._background:
                    await self._count()
                    for _ in range(self._workers):
                        nursery.start_soon(self._copy_pending)
                await self._clusters.finished.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.hook.abandon()

    async def _let_guests_go_at_the_end(self) -> None:
        """However ``run`` ends: guests are free at once, though an I/O may hang for long."""
        try:
            await self.hook.broken.wait()
            assert self.hook.failure is not None
            raise self.hook.failure
        finally:
            self.hook.abandon()

    async def _count(self) -> None:
        """Count what is to be copied, where that takes a walk over the bitmap, or the source."""
        total = self._clusters.count_at_once()
        if total is None:
            total = 0
            for counted, (first, end) in enumerate(self._clusters.wanted_runs(), 1):
                total += end - first
                if counted % limits.BACKUP_SCAN_RUNS == 0:
                    await trio.lowlevel.checkpoint()
        if self._top_only:
            total -= await leave_out_lower_layers(self._source, self._clusters)
        self._job.set_total(total << self._clusters.shift)
        self._clusters.set_total(total)

    # -- in the background -------------------------------------------------------------------

    async def _copy_pending(self) -> None:
        """One worker. Its buffer serves for everything it copies."""
        step_bytes = self._step << self._clusters.shift
        buffer = memoryview(mmap.mmap(-1, max(limits.BACKUP_CHUNK_BYTES, step_bytes)))
        while True:
            if not await self._feeder.look_ahead():
                await self._clusters.wait_given_back()
                continue
            async with self._job.turn():
                if (source := self._sweepable()) is not None:
                    todo = await self._sweep(source, buffer)
                else:
                    todo = deque(await self._next_data(buffer))
                await self._write_all(todo)
            while todo:
                # The job was stopped by an error; the turn comes when it has been resumed.
                async with self._job.turn():
                    await self._write_all(todo)

    async def _next_data(self, buffer: memoryview) -> Sequence[OldData]:
        """Take a piece and read it; nothing where others took it, or where it can't be read."""
        limit = self._chunk_clusters()
        piece = self._feeder.take(limit, limit if self._job.speed else self._max_chunk)
        if piece is None:
            return ()
        self._job.charge(self._clusters.length(piece.first, piece.end))
        if piece.zero:
            self._clusters.settle_unread(piece.first, piece.end)
            return (OldData(piece.first, piece.end, None),)
        return await self._read(piece, buffer)

    def _sweepable(self) -> Descriptor | None:
        """How a thread reads the source; None where only the nodes' own calls will do."""
        if self._job.speed or self._sweep_failed or not self._storing.by_threads:
            return None
        return self._source.descriptor()

    async def _sweep(self, source: Descriptor, buffer: memoryview) -> deque[OldData]:
        """Let a thread copy a long piece; returns what it read and could not write."""
        clusters = self._clusters
        piece = self._feeder.take(self._sweep_clusters(), self._max_chunk)
        if piece is None:
            return deque()
        if piece.zero:
            clusters.settle_unread(piece.first, piece.end)
            return deque([OldData(piece.first, piece.end, None)])
        shift = clusters.shift
        sweep = Sweep(
            piece.first,
            piece.end,
            clusters.length,
            shift=shift,
            step=self._step,
            unwanted=self._is_sweep_unwanted,
            is_plain=self._storing.is_plain,
        )
        claim = clusters.claim(piece.first, piece.end, sweep)
        try:
            await self._target.write_by(
                piece.first << shift,
                clusters.length(piece.first, piece.end),
                lambda target, end_bytes: sweep.copy(source, target, buffer, end_bytes),
            )
        except OSError:
            # No place for them. The other way of copying meets the error again.
            self._sweep_failed = True
        except BaseException:
            clusters.tear(sweep.swept.written_end, sweep.swept.read_end)
            clusters.give_back(claim)
            raise
        return self._end_sweep(claim, sweep.swept, buffer)

    def _is_sweep_unwanted(self) -> bool:
        """Asked in a thread, so it only looks."""
        return self.hook.abandoned or self._job.paused or self._job.speed > 0

    def _end_sweep(self, claim: ReadClaim, swept: Swept, buffer: memoryview) -> deque[OldData]:
        clusters = self._clusters
        clusters.tear(swept.written_end, swept.read_end)
        if self.hook.abandoned:
            # Once guests are let go, what was read may be newer than the start.
            clusters.give_back(claim)
            return deque()
        clusters.settle_to(claim, swept.read_end)
        # Asked again, it is the other way of copying that meets the error and deals with it; or
        # that copies what lies in parts that are smaller than a cluster.
        nothing = swept.begun_end == swept.first < claim.end and not self._is_sweep_unwanted()
        self._sweep_failed |= nothing or swept.read_end < swept.begun_end
        clusters.give_back(claim)
        if swept.first < swept.written_end:
            self._saved(OldData(swept.first, swept.written_end, None))
        if swept.written_end == swept.read_end:
            return deque()
        view = buffer[: clusters.length(swept.written_end, swept.read_end)]
        return deque([OldData(swept.written_end, swept.read_end, view)])

    def _sweep_clusters(self) -> int:
        size_bytes = (
            limits.BACKUP_SWEEP_BUSY_BYTES if self._guests_busy() else limits.BACKUP_SWEEP_BYTES
        )
        return max(1, size_bytes >> self._clusters.shift)

    def _chunk_clusters(self) -> int:
        busy = self._guests_busy()
        return self._at_most(limits.BACKUP_CHUNK_BUSY_BYTES if busy else limits.BACKUP_CHUNK_BYTES)

    def _at_most(self, size_bytes: int) -> int:
        """The clusters of one copy for which so many bytes would do."""
        return max(1, min(size_bytes >> self._clusters.shift, self._max_chunk))

    def _guests_busy(self) -> bool:
        now = trio.current_time()
        if self._writes_seen != self.hook.writes_seen:
            self._writes_seen = self.hook.writes_seen
            self._guests_idle_from = now + limits.BACKUP_GUEST_IDLE_SECONDS
        return now < self._guests_idle_from

    async def _write_all(self, todo: deque[OldData]) -> None:
        """Write what is to be written, or up to where an error stops the job."""
        while todo and await self._write(todo[0]):
            todo.popleft()

    # -- reading the source ------------------------------------------------------------------

    async def _read(self, piece: Piece, buffer: memoryview) -> Sequence[OldData]:
        """Bring a piece into memory: what of it can be read; nothing where it is given back."""
        clusters = self._clusters
        claim = clusters.claim(piece.first, piece.end)
        try:
            view = buffer[: clusters.length(piece.first, piece.end)]
            data = await self._read_claim(OldData(piece.first, piece.end, view))
        except BaseException:
            clusters.give_back(claim)
            raise
        if data is None or self.hook.abandoned:
            # Once guests are let go, what was read may be newer than the start.
            clusters.give_back(claim)
            return ()
        clusters.settle(claim)
        clusters.skip(piece.end - piece.first - sum(each.end - each.first for each in data))
        return data

    async def _read_claim(self, wanted: OldData) -> Sequence[OldData] | None:
        """The claimed clusters that can be read; None where an error stopped the job."""
        try:
            await self._fill(wanted)
        except OSError as error:
            action = self._decide("read", error)
            if action is ErrorAction.REPORT:
                raise
            if action is ErrorAction.STOP:
                return None
            return [each for each in self._singly(wanted) if await self._is_readable(each)]
        return (wanted,)

    async def _is_readable(self, wanted: OldData) -> bool:
        try:
            await self._fill(wanted)
        except OSError:
            return False
        return True

    async def _fill(self, wanted: OldData) -> None:
        assert wanted.view is not None
        await self._source.read(wanted.first << self._clusters.shift, wanted.view)

    # -- writing the target ------------------------------------------------------------------

    async def _write_held(self) -> None:
        """One writer of the held store."""
        while True:
            held = await self._held.get()
            try:
                while not await self._write(held.data):
                    await self._job.pause_point()
            except trio.Cancelled:
                self._held.put_back(held)
                raise
            self._held.free(held.slot)

    async def drain(self) -> bool:
        """Write what is held, after ``run``; False where the target does not take it."""
        while (held := self._held.get_nowait()) is not None:
            try:
                await self._storing.store(held.data)
            except OSError as error:
                self._clusters.tear(held.data.first, held.data.end)
                _log.warning("job '%s': kept data is lost, writing failed: %s", self._job.id, error)
                return False
            self._saved(held.data)
        return True

    async def _write(self, data: OldData) -> bool:
        """Write old data, or skip it; False where an error stopped the job."""
        try:
            await self._storing.store(data)
        except OSError as error:
            self._clusters.tear(data.first, data.end)
            action = self._decide("write", error)
            if action is ErrorAction.REPORT:
                raise
            if action is ErrorAction.STOP:
                return False
            await self._write_singly(data)
        else:
            self._saved(data)
        return True

    async def _write_singly(self, data: OldData) -> None:
        for each in self._singly(data):
            try:
                await self._storing.store(each)
            except OSError:
                self._clusters.skip(1)
            else:
                self._saved(each)

    def _saved(self, data: OldData) -> None:
        self._clusters.save(data.first, data.end)
        if self.discard is not None:
            self.discard.add(data.first, data.end)
        self._job.advance((data.end - data.first) << self._clusters.shift)

    # -- trouble -----------------------------------------------------------------------------

    def _singly(self, data: OldData) -> Iterator[OldData]:
        """The data cluster by cluster, to find the ones that fail."""
        shift = self._clusters.shift
        for cluster in range(data.first, data.end):
            start = (cluster - data.first) << shift
            view = None if data.view is None else data.view[start : start + (1 << shift)]
            yield OldData(cluster, cluster + 1, view)

    def _decide(self, operation: Literal["read", "write"], error: OSError) -> ErrorAction:
        """What is to be done about an error that the background, or a writer, met."""
        number = error.errno or errno.EIO
        policy = self._on_errors.source if operation == "read" else self._on_errors.target
        stopped = self._job.io_status is not IoStatus.OK
        if stopped and action_on_error(policy, number) is ErrorAction.STOP:
            # One error is announced, not each of those that were under way with it.
            return ErrorAction.STOP
        return self._job.handle_error(operation, number, policy)

    def _ignore_guest_read_error(self, error: OSError) -> bool:
        """A guest can't wait for an administrator, so here ``stop`` means that the job fails."""
        number = error.errno or errno.EIO
        ignored = action_on_error(self._on_errors.source, number) is ErrorAction.IGNORE
        policy = OnError.IGNORE if ignored else OnError.REPORT
        self._job.handle_error("read", number, policy)
        return ignored
