"""One instant of a node, kept by copying to a target what is about to be overwritten."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.backup.clusters import Clusters
from blockd.backup.fleecing import FleecingView, stands_on
from blockd.block import Allocation, Node


@dataclass(slots=True, eq=False)
class _Copy:
    """Clusters from ``first`` up to ``end``, on their way to the target.

    ``ended`` is set when it has come to an end, or when nobody needs to wait for that any more.
    """

    first: int
    end: int
    ended: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None


class KeptInstant:
    """The source's hook (``BeforeWrite``), and the way to read what it held at the instant.

    A write waits until the old data is on the target. Where that fails or takes too long, either
    the write fails, or the view is broken: then nothing is kept any more, and reading it fails.
    """

    def __init__(
        self,
        source: Node,
        target: Node,
        clusters: Clusters,
        tasks: trio.Nursery,
        *,
        breaks_writes: bool,
        timeout_seconds: float = math.inf,
    ) -> None:
        """``breaks_writes``: rather fail a write than lose the view. ``tasks`` outlive this.

        ``timeout_seconds``: how long one write may wait.
        """
        self._source = source
        #: Where the old data goes.
        self.target = target
        self._clusters = clusters
        self._tasks = tasks
        self._breaks_writes = breaks_writes
        self._timeout_seconds = timeout_seconds
        self._shift = clusters.shift
        #: On the target, or nobody wants them (any more).
        self._settled = clusters.settled
        self._dropped = BitMap64()
        self._copies: dict[int, _Copy] = {}
        #: A target that hangs can't make more and more copies wait in memory.
        self._room = trio.Semaphore(limits.CBW_COPIES)
        self._idle = trio.Event()
        #: Nothing is kept any more.
        self._over = False
        if stands_on(target, source):
            target.show(FleecingView(source, target, clusters, None, lambda: self._over))

    # -- for the source ----------------------------------------------------------------------

    def before_write_nowait(self, offset: int, length: int) -> bool:
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        return self._over or self._settled.contains_range(first, last + 1)

    async def before_write(self, offset: int, length: int) -> None:
        """Raises ``OSError`` where this view is one that rather fails a write."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        try:
            with trio.fail_after(self._timeout_seconds):
                for run_first, run_end in self._clusters.wanted_runs(first, last + 1):
                    await self._keep(run_first, run_end)
        except trio.TooSlowError:
            self._fail(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    async def _keep(self, first: int, end: int) -> None:
        """Return once these clusters are on the target, or the view is over."""
        while not self._over and (first := self._clusters.next_unsettled(first, end)) < end:
            copy = self._copies.get(first)
            if copy is None:
                await self._room.acquire()
                copy = self._start_copy(first, end)
            if copy is None:
                self._room.release()
                continue
            await copy.ended.wait()
            if copy.error is not None:
                self._fail(copy.error)

    def _start_copy(self, first: int, end: int) -> _Copy | None:
        """Begin to copy from a cluster on; None where others came first. It takes the room."""
        stop = first
        limit = min(end, first + max(1, limits.BACKUP_CHUNK_BYTES >> self._shift))
        while stop < limit and stop not in self._settled and stop not in self._copies:
            stop += 1
        if stop == first or self._over:
            return None
        copy = _Copy(first, stop)
        self._copies.update(dict.fromkeys(range(first, stop), copy))
        self._tasks.start_soon(self._run, copy)
        return copy

    async def _run(self, copy: _Copy) -> None:
        """A task of its own, so that a write need not wait for it to end."""
        try:
            await self._store(copy)
        except OSError as error:
            copy.error = error
        else:
            self._settled.add_range(copy.first, copy.end)
            self._clusters.unsaved.remove_range(copy.first, copy.end)
        finally:
            for cluster in range(copy.first, copy.end):
                del self._copies[cluster]
            copy.ended.set()
            self._room.release()
            if not self._copies:
                self._idle.set()

    async def _store(self, copy: _Copy) -> None:
        offset = copy.first << self._shift
        data = bytearray(self._clusters.length(copy.first, copy.end))
        await self._source.read(offset, memoryview(data))
        self._clusters.unsaved.add_range(copy.first, copy.end)
        if data == bytes(len(data)):
            await self.target.write_zeroes(offset, len(data), unmap=True)
        else:
            await self.target.write(offset, memoryview(data))

    def _fail(self, error: OSError) -> None:
        """Old data could not be kept: fail the write, or give up."""
        if self._breaks_writes and not self._over:
            raise OSError(error.errno, error.strerror)
        self._give_up()

    def _give_up(self) -> None:
        self._over = True
        for copy in self._copies.values():
            copy.ended.set()

    async def close(self) -> None:
        """Keep nothing any more; returns when nothing uses source and target any more."""
        self._give_up()
        while self._copies:
            self._idle = trio.Event()
            await self._idle.wait()
        self._source.remove_hook(self)
        if stands_on(self.target, self._source):
            self.target.show(None)

    # -- the view ----------------------------------------------------------------------------

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what the source held at the instant.

        Raises ``OSError``: EACCES for what is not kept.
        """
        at, end = offset, offset + len(view)
        while at < end:
            stop, holder = self._find(at, end)
            await holder.read(at, view[at - offset : stop - offset])
            if self._is_right(at, stop, holder):
                at = stop

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        """As ``Driver.allocation``, of the instant. Raises ``OSError`` as ``read`` does."""
        while True:
            stop, holder = self._find(offset, offset + length)
            runs = await holder.allocation(offset, stop - offset)
            if self._is_right(offset, stop, holder):
                return runs

    def _find(self, offset: int, end: int) -> tuple[int, Node]:
        """Who holds the data from ``offset`` on, and up to where."""
        self._check_accessible(offset, end)
        first, stop = offset >> self._shift, -(-end >> self._shift)
        if first in self._settled:
            stop = self._clusters.next_unsettled(first, stop)
            return min(stop << self._shift, end), self.target
        with suppress(ValueError):
            stop = min(stop, self._settled.next_set_bit(first))
        return min(stop << self._shift, end), self._source

    def _is_right(self, offset: int, stop: int, holder: Node) -> bool:
        """Whether ``holder`` still held it when it had been read.

        Nobody writes to a cluster of the source before it is settled.
        """
        if self._over:
            self._refuse()
        return holder is self.target or self._find(offset, stop) == (stop, holder)

    def _check_accessible(self, offset: int, end: int) -> None:
        first, stop = offset >> self._shift, -(-end >> self._shift)
        wanted = sum(run[1] - run[0] for run in self._clusters.wanted_runs(first, stop))
        dropped = self._dropped.range_cardinality(first, stop)
        if self._over or wanted < stop - first or dropped:
            self._refuse()

    def _refuse(self) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    async def drop(self, offset: int, length: int) -> None:
        """Nobody needs these bytes of the instant: whole clusters are no longer kept."""
        end = offset + length
        first, stop = -(-offset >> self._shift), end >> self._shift
        if end == self._clusters.size_bytes:
            stop = self._clusters.count
        if first < stop:
            self._dropped.add_range(first, stop)
            self._settled.add_range(first, stop)
            await self.target.discard(first << self._shift, self._clusters.length(first, stop))
