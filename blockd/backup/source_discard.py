"""Gives the source's space back for what was copied, where the user asked for that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.backup.clusters import Clusters
from blockd.block import Node

_log = logging.getLogger(__name__)


class SourceDiscard:
    """Discards what is durable on the target, and no guest has written since the start.

    It is a hook of the source (``BeforeWrite``), before that of the point-in-time view: it notes
    what guests write, and keeps them from writing to what is being discarded at that moment.
    """

    def __init__(self, job_id: str, source: Node, target: Node, clusters: Clusters) -> None:
        self._job_id = job_id
        self._source = source
        self._target = target
        self._clusters = clusters
        self._shift = clusters.shift
        #: On the target, perhaps not durably, and not yet discarded.
        self._saved = BitMap64()
        self._written_by_guests = BitMap64()
        self._enough = trio.Event()
        #: The run that is being discarded, and by which task.
        self._now = range(0)
        self._ended = trio.Event()
        self._task: trio.lowlevel.Task | None = None

    # -- for the node ------------------------------------------------------------------------

    def before_write_nowait(self, offset: int, length: int) -> bool:
        return not self._note(offset, length)

    async def before_write(self, offset: int, length: int) -> None:
        if trio.lowlevel.current_task() is self._task:
            return
        while self._note(offset, length):
            await self._ended.wait()

    def _note(self, offset: int, length: int) -> bool:
        """Note what a guest writes; whether some of it is being discarded."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        self._written_by_guests.add_range(first, last + 1)
        return first < self._now.stop and self._now.start <= last

    # -- for the backup ----------------------------------------------------------------------

    def add(self, first: int, end: int) -> None:
        """The range of clusters was written to the target."""
        self._saved.add_range(first, end)
        if len(self._saved) << self._shift >= limits.BACKUP_DISCARD_BYTES:
            self._enough.set()

    async def run(self) -> None:
        """Flush the target and discard, each time that there is enough."""
        while True:
            await self._enough.wait()
            self._enough = trio.Event()
            saved = self._saved.copy()
            try:
                await self._target.flush()
            except OSError:
                # The job's own flush meets that too, and fails the job.
                return
            await self._discard(saved)

    async def finish(self) -> None:
        """Discard the rest; everything is durable."""
        await self._discard(self._saved.copy())

    async def _discard(self, durable: BitMap64) -> None:
        """A cancel on the way leaves what was not discarded to be so later."""
        self._task = trio.lowlevel.current_task()
        try:
            for first, end in self._unwritten(durable):
                await self._discard_run(first, end)
                self._saved.remove_range(first, end)
        except OSError as error:
            # The backup is none the worse for it.
            _log.warning("job '%s': discarding on the source failed: %s", self._job_id, error)
        finally:
            self._task = None
        self._saved -= durable

    def _unwritten(self, durable: BitMap64) -> Iterator[tuple[int, int]]:
        """Runs that no guest has written, each looked for when the one before is done."""
        written, longest = self._written_by_guests, limits.BACKUP_DISCARD_BYTES >> self._shift
        end = 0
        with suppress(ValueError):
            while True:
                first = end = durable.next_set_bit(end)
                while end in durable and end not in written and end - first < longest:
                    end += 1
                if first < end:
                    yield first, end
                else:
                    end += 1

    async def _discard_run(self, first: int, end: int) -> None:
        self._now, self._ended = range(first, end), trio.Event()
        try:
            await self._source.discard(first << self._shift, self._clusters.length(first, end))
        finally:
            self._now = range(0)
            self._ended.set()
