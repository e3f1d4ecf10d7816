"""What the copy workers take next: the wanted clusters in order, then what was given back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import trio

from blockd import limits
from blockd.backup.clusters import Clusters
from blockd.backup.source_map import SourceMap


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of pending clusters to copy; ``zero``: they need not be read."""

    first: int
    end: int
    zero: bool


class Feeder:
    """One place in the work, shared by all workers.

    ``look_ahead`` may wait for the source, ``take`` never does: so a worker holds no cluster
    while it waits, be it for the source, for its turn or for a paused job.
    """

    def __init__(self, clusters: Clusters, source_map: SourceMap) -> None:
        self._clusters = clusters
        self._map = source_map
        self._runs = clusters.wanted_runs()
        self._one_looks = trio.Lock()
        #: The wanted run that is being worked on: where in it the work stands, and its end. What
        #: is pending first reaches from ``_at`` to ``_pending_end``.
        self._at = 0
        self._pending_end = 0
        self._end = 0

    async def look_ahead(self) -> bool:
        """Make ready for ``take``; False where nothing is pending now."""
        async with self._one_looks:
            for looked_at in itertools.count(1):
                if self._find_pending():
                    if self._map.find(self._at) is not None:
                        break
                    await self._map.ask(self._at)
                elif not self._next_run():
                    return False
                elif looked_at % limits.BACKUP_SCAN_RUNS == 0:
                    await trio.lowlevel.checkpoint()
            return True

    def take(self, data_limit: int, zero_limit: int) -> Piece | None:
        """The next piece, of at most so many clusters; None where others have taken it all.

        The piece is still pending: the caller claims or settles it before it awaits anything.
        """
        if not self._find_pending() or (run := self._map.find(self._at)) is None:
            return None
        first = self._at
        limit = zero_limit if run.chosen else data_limit
        self._at = min(self._pending_end, run.end, first + limit)
        return Piece(first, self._at, run.chosen)

    def _find_pending(self) -> bool:
        """Go to the next pending cluster of the run; False where there is none."""
        self._at, self._pending_end = self._clusters.next_pending(self._at, self._end)
        return self._at < self._end

    def _next_run(self) -> bool:
        """Go to the next run; False where there is none now."""
        run = next(self._runs, None) or self._clusters.pop_given_back()
        if run is None:
            return False
        self._at, self._end = run
        return True
