"""Requests under way, so that a cluster they use is not given to somebody else meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Requests:
    """Counts requests by the epoch that they began in.

    A cluster that is freed in one epoch may be used by requests of that epoch and before, which
    found it in a table; those of later ones can't have found it.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._active: Counter[int] = Counter()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        epoch = self._epoch
        self._active[epoch] += 1
        try:
            yield
        finally:
            self._active[epoch] -= 1
            if not self._active[epoch]:
                del self._active[epoch]

    def next_epoch(self) -> int:
        """Begin another epoch; the one that ended is returned."""
        self._epoch += 1
        return self._epoch - 1

    def ended(self, epoch: int) -> bool:
        """Whether no request of that epoch, or of one before, is under way."""
        return all(active > epoch for active in self._active)


class Busy:
    """Guest clusters that a write is giving other host clusters: it alone changes their entries."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], trio.Event] = {}

    def clip(self, first: int, end: int) -> int:
        """How many of the clusters from ``first`` up to ``end`` nobody holds, from the first on."""
        for start, stop in self._held:
            if start < end and first < stop:
                end = max(start, first)
        return end - first

    async def wait(self, first: int, end: int) -> None:
        """Return when nobody holds any of the clusters; at once if that is so now."""
        while (event := self._holder(first, end)) is not None:
            await event.wait()

    def _holder(self, first: int, end: int) -> trio.Event | None:
        for (start, stop), event in self._held.items():
            if start < end and first < stop:
                return event
        return None

    @contextmanager
    def hold(self, first: int, end: int) -> Iterator[None]:
        """Hold clusters that nobody holds."""
        event = self._held[first, end] = trio.Event()
        try:
            yield
        finally:
            del self._held[first, end]
            event.set()
