"""What a node was asked for, counted so that the hot path hardly notices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType


@dataclass(slots=True)
class Counts:
    """Requests of one kind. Used as a context, it counts and times what ``of`` announced."""

    operations: int = 0
    total_bytes: int = 0
    time_ns: int = 0
    #: Those that the storage failed, and those that could not be meant (past the end, say).
    failed: int = 0
    invalid: int = 0

    def of(self, length: int) -> _Timed:
        """A context for one request over ``length`` bytes; an ``OSError`` in it is a failure."""
        return _Timed(self, length)

    def add(self, operations: int, total_bytes: int, time_ns: int) -> None:
        self.operations += operations
        self.total_bytes += total_bytes
        self.time_ns += time_ns


class _Timed:
    """A class, because a generator's context costs three times as much."""

    __slots__ = ("_counts", "_length", "_started_ns")

    def __init__(self, counts: Counts, length: int) -> None:
        self._counts = counts
        self._length = length

    def __enter__(self) -> None:
        self._started_ns = time.monotonic_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._counts.add(1, self._length, time.monotonic_ns() - self._started_ns)
        elif isinstance(error, OSError):
            self._counts.failed += 1


@dataclass(slots=True)
class Inline:
    """Reads and writes that finished at once, added up burst by burst.

    Those of a node whose driver passes them down as they are went through the node below too;
    that is worked out when somebody asks.
    """

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    #: The highest end of a write.
    highest: int = 0

    def add(  # noqa: PLR0917 - names cost the hot loop more than this does
        self,
        reads: int,
        read_bytes: int,
        writes: int,
        write_bytes: int,
        highest: int,
        seconds: float,
    ) -> None:
        """One burst, of at least one request, that took ``seconds``.

        To time each request would cost more than many of them take, so all get the same share.
        """
        if reads:
            share = seconds * reads / (reads + writes) if writes else seconds
            self.reads += reads
            self.read_bytes += read_bytes
            self.read_seconds += share
            seconds -= share
        if writes:
            self.writes += writes
            self.write_bytes += write_bytes
            self.write_seconds += seconds
            self.highest = max(self.highest, highest)


@dataclass(slots=True)
class Accounts:
    """All that was counted of a node."""

    read: Counts = field(default_factory=Counts)
    write: Counts = field(default_factory=Counts)
    flush: Counts = field(default_factory=Counts)
    unmap: Counts = field(default_factory=Counts)
    #: The highest end of a write.
    highest: int = 0

    def total(self, inlines: Iterable[tuple[Inline, int]]) -> Accounts:
        """These and ``inlines``, each with what its offsets are shifted by on the way here."""
        total = Accounts(
            replace(self.read),
            replace(self.write),
            replace(self.flush),
            replace(self.unmap),
            self.highest,
        )
        for inline, shift in inlines:
            total.read.add(inline.reads, inline.read_bytes, int(inline.read_seconds * 1e9))
            total.write.add(inline.writes, inline.write_bytes, int(inline.write_seconds * 1e9))
            if inline.writes:
                total.highest = max(total.highest, inline.highest + shift)
        return total
