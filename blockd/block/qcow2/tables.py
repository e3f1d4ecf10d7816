"""The metadata that is held in memory: tables of one cluster each, and which of them changed."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

#: Changed parts are written in blocks of this size (or the table's, if that is less), so that
#: one changed entry of a large table costs little.
_WRITE_BYTES = 4096


class Table:
    """One table. ``words`` are numbers; ``touched`` spares it the next eviction."""

    __slots__ = ("dirty_end", "dirty_start", "offset", "touched", "words")

    def __init__(self, offset: int, words: array[int]) -> None:
        self.offset = offset
        self.words = words
        self.touched = True
        #: The changed words; none where the end is not after the start.
        self.dirty_start = len(words)
        self.dirty_end = 0


class Change(NamedTuple):
    """Bytes of a table that are to be written to the file."""

    offset: int
    data: bytes


class TableCache:
    """Tables by a key: the L1 index, or the index in the refcount table.

    A changed table stays until ``written``, so its changes exist nowhere else. Those that did not
    change are dropped, oldest first, when there are more than ``limit``.
    """

    def __init__(
        self,
        cluster_bytes: int,
        limit: int,
        read: Callable[[int], Awaitable[array[int]]],
        encode: Callable[[array[int]], bytes],
    ) -> None:
        """``read`` gives the words at an offset, ``encode`` makes bytes of some of them."""
        self.tables: dict[int, Table] = {}
        self._limit = limit
        self._read = read
        self._encode = encode
        self._cluster_bytes = cluster_bytes
        self._write_bytes = min(_WRITE_BYTES, cluster_bytes)
        self._dirty: set[int] = set()
        self._being_written: set[int] = set()
        self._loading: dict[int, trio.Event] = {}
        self._pins: Counter[int] = Counter()

    @property
    def dirty_count(self) -> int:
        return len(self._dirty)

    def peek(self, key: int) -> Table | None:
        """The table, where it is in memory."""
        table = self.tables.get(key)
        if table is not None:
            table.touched = True
        return table

    async def load(self, key: int, offset: int) -> Table:
        """The table, which lies at ``offset``. Raises ``OSError``."""
        while (table := self.peek(key)) is None:
            if (loading := self._loading.get(key)) is not None:
                await loading.wait()
                continue
            self._loading[key] = trio.Event()
            try:
                words = await self._read(offset)
                if key not in self.tables:  # it has not moved meanwhile
                    self._add(key, Table(offset, words))
            finally:
                self._loading.pop(key).set()
        return table

    def put(self, key: int, offset: int, words: array[int]) -> Table:
        """Hold a table that is new, or that has moved: all of it is to be written."""
        table = Table(offset, words)
        self._add(key, table)
        self.mark(key, table, 0, len(words))
        return table

    def mark(self, key: int, table: Table, start: int, end: int) -> None:
        """Words from ``start`` up to ``end`` have changed."""
        table.dirty_start = min(table.dirty_start, start)
        table.dirty_end = max(table.dirty_end, end)
        self._dirty.add(key)

    @contextmanager
    def pinned(self, key: int) -> Iterator[None]:
        """The table, which is in memory now, stays there while the body runs."""
        self._pins[key] += 1
        try:
            yield
        finally:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def drop(self, key: int) -> None:
        """Forget a table, and what changed in it: nothing refers to it any more."""
        self.tables.pop(key, None)
        self._dirty.discard(key)

    def _add(self, key: int, table: Table) -> None:
        self._evict()
        self.tables[key] = table

    def _evict(self) -> None:
        """Make room for one more: one look at each table, whatever it finds."""
        for _ in range(len(self.tables)):
            if len(self.tables) < self._limit:
                return
            key, table = next(iter(self.tables.items()))
            del self.tables[key]
            if table.touched or self._must_stay(key):
                table.touched = False
                self.tables[key] = table

    def _must_stay(self, key: int) -> bool:
        return key in self._dirty or key in self._being_written or key in self._pins

    # -- writing back ------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """All that changed since the last time, in the order of the file.

        The caller owes a call of ``written`` or ``not_written``.
        """
        changes = [self._take(self.tables[key]) for key in self._dirty]
        self._being_written = self._dirty
        self._dirty = set()
        return sorted(changes, key=lambda change: change.offset)

    def _take(self, table: Table) -> Change:
        words = table.words
        block_words = len(words) * self._write_bytes // self._cluster_bytes
        first = table.dirty_start // block_words
        end = -(-table.dirty_end // block_words)
        table.dirty_start, table.dirty_end = len(words), 0
        data = self._encode(words[first * block_words : end * block_words])
        return Change(table.offset + first * self._write_bytes, data)

    def written(self) -> None:
        self._being_written = set()

    def not_written(self) -> None:
        """What was taken did not reach the file: it counts as changed again, in full."""
        for key in self._being_written & self.tables.keys():
            table = self.tables[key]
            self.mark(key, table, 0, len(table.words))
        self._being_written = set()
