"""Which clusters of the file are in use (specification, "Host cluster management")."""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from pyroaring import BitMap64

from blockd import limits
from blockd.block.qcow2.entries import OFFSET_MASK, CorruptImageError
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.tables import TableCache
from blockd.block.qcow2.words import RefcountCodec, find_zero, used_end, zero_run
from blockd.errors import BlockdError
from blockd.extent import Extent

_Result = TypeVar("_Result")

NEEDS_REBUILDING = (
    "qcow2: the image's refcounts can't be repaired in place; use 'qemu-img check -r all'"
)


class _MissingBlock(Exception):  # noqa: N818 - a signal to load it and try again
    """A change needs a refcount block that is not in memory; it has changed nothing."""

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass(frozen=True, slots=True)
class Clusters:
    """Host clusters that follow each other; ``virgin``: they read as zeroes."""

    first: int
    count: int
    virgin: bool


@dataclass(frozen=True, slots=True)
class _Tail:
    """``count`` clusters from ``start`` on, and the new blocks that lie behind them."""

    start: int
    count: int
    blocks: list[int]


class Refcounts:
    """The refcount table and blocks, and what is free by them.

    Every change is one plain function on what is in memory; where it lacks a block, that is
    loaded and the function is tried again. So no two changes can come between each other.
    """

    def __init__(
        self, file: HostFile, header: Header, table: array[int], metadata: BitMap64
    ) -> None:
        """``metadata``: the clusters of all tables, which this adds its own to."""
        self._file = file
        self._cluster_bits = header.cluster_bits
        self._codec = RefcountCodec(header.refcount_order)
        self._per_block = header.refcount_block_entries
        self.table = table
        self.table_offset = header.refcount_table_offset
        #: Whether the whole table is to be written, because it moved.
        self.table_moved = False
        self.dirty_entries: set[int] = set()
        self.metadata = metadata
        cluster_bytes = header.cluster_size_bytes
        self.blocks = TableCache(
            cluster_bytes,
            max(limits.QCOW2_REFCOUNT_CACHE_BYTES // cluster_bytes, limits.QCOW2_CACHE_TABLES_MIN),
            self._read_block,
            self._codec.encode,
        )
        #: No cluster before it is free.
        self._cursor = 0
        #: From here on no cluster was ever used: the file ends before, and grows with zeroes.
        self._virgin_from = -(-file.node.size_bytes // cluster_bytes)
        #: Where the next compressed cluster may go, inside a cluster that others use already.
        self.packed_end = 0
        self._freed: list[tuple[int, int]] = []
        self._abandoned: list[tuple[int, int]] = []

    async def _read_block(self, offset: int) -> array[int]:
        self._file.debug_event("refblock_load")
        data = await self._file.read_bytes(offset, 1 << self._cluster_bits)
        return self._codec.decode(data)

    async def _change(self, change: Callable[[], _Result]) -> _Result:
        while True:
            try:
                return change()
            except _MissingBlock as missing:
                offset = self._block_offset(missing.index)
                if offset >= self._file.node.size_bytes:
                    raise CorruptImageError(
                        f"refcount block offset {offset:#x} is beyond the end of the file"
                    ) from None
                await self.blocks.load(missing.index, offset)

    def _block_offset(self, index: int) -> int:
        """Where a block lies; 0: there is none, and all its counts are 0."""
        if index >= len(self.table):
            return 0
        offset = self.table[index] & OFFSET_MASK
        if offset & ((1 << self._cluster_bits) - 1):
            raise CorruptImageError(f"refcount block offset {offset:#x} is not aligned")
        return offset

    def _block(self, index: int) -> array[int]:
        table = self.blocks.peek(index)
        if table is None:
            raise _MissingBlock(index)
        return table.words

    def _set(self, first: int, counts: array[int]) -> None:
        """Give the clusters these counts; their blocks are in memory."""
        at = 0
        while at < len(counts):
            index, start = divmod(first + at, self._per_block)
            part = counts[at : at + self._per_block - start]
            table = self.blocks.peek(index)
            assert table is not None
            table.words[start : start + len(part)] = part
            self.blocks.mark(index, table, start, start + len(part))
            at += len(part)

    # -- taking ------------------------------------------------------------------------------

    async def allocate(self, count: int) -> Clusters:
        """Take up to ``count`` free clusters that follow each other. Raises ``OSError``."""
        self._file.debug_event("cluster_alloc")
        return await self._change(lambda: self._allocate(count))

    def allocate_nowait(self, count: int) -> Clusters | None:
        """Take ``count`` free clusters that follow each other, where that is done at once."""
        try:
            clusters = self._allocate(count)
        except _MissingBlock:
            return None
        if clusters.count < count:
            self.take_back(clusters)
            return None
        return clusters

    def take_back(self, clusters: Clusters) -> None:
        """Undo what was just allocated, and not written to."""
        self._set(clusters.first, self._codec.zeroes(clusters.count))
        self._cursor = clusters.first
        if clusters.virgin:
            self._virgin_from = clusters.first

    async def allocate_all(self, count: int) -> Clusters:
        """Take exactly ``count`` clusters that follow each other, behind all that is used."""
        self._file.debug_event("cluster_alloc")
        return await self._change(lambda: self._allocate_tail(count))

    def _allocate(self, count: int) -> Clusters:
        while True:
            index, start = divmod(self._cursor, self._per_block)
            if not self._block_offset(index):
                self._add_block(index)
            counts = self._block(index)
            free = find_zero(counts, start)
            if free < 0:
                self._cursor = (index + 1) * self._per_block
                continue
            taken = self._take(index * self._per_block + free, zero_run(counts, free, count))
            self._cursor = taken.first + taken.count
            return taken

    def _take(self, first: int, count: int) -> Clusters:
        if first + count > (OFFSET_MASK >> self._cluster_bits):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if self.metadata.range_cardinality(first, first + count):
            raise CorruptImageError("the refcount of a cluster with metadata is 0")
        self._set(first, self._codec.ones(count))
        virgin = first >= self._virgin_from
        self._virgin_from = max(self._virgin_from, first + count)
        return Clusters(first, count, virgin)

    def _add_block(self, index: int) -> None:
        """Make a block that counts itself: it is the first cluster of those that it counts."""
        self._file.debug_event("refblock_alloc")
        if index >= len(self.table):
            self._grow_table(index + 1)
            return
        cluster = index * self._per_block
        self._put_block(index, cluster)
        self._set(cluster, self._codec.ones(1))
        self._virgin_from = max(self._virgin_from, cluster + 1)

    def _put_block(self, index: int, cluster: int) -> None:
        if cluster in self.metadata:
            raise CorruptImageError("the refcount of a cluster with metadata is 0")
        offset = cluster << self._cluster_bits
        self.table[index] = offset
        self.dirty_entries.add(index)
        self.blocks.put(index, offset, self._codec.zeroes(self._per_block))
        self.metadata.add(cluster)

    # -- room behind all that is used --------------------------------------------------------

    def _allocate_tail(self, count: int) -> Clusters:
        tail = self._tail(count)
        if tail.blocks and tail.blocks[-1] >= len(self.table):
            self._grow_table(tail.blocks[-1] + 1)
            tail = self._tail(count)
        return self._take_tail(tail)

    def _tail(self, count: int) -> _Tail:
        """Where ``count`` clusters fit, followed by the blocks that are missing to count all."""
        start = self._used_end()
        blocks: list[int] = []
        while True:
            end = start + count + len(blocks)
            indices = range(start // self._per_block, -(-end // self._per_block))
            missing = [index for index in indices if not self._block_offset(index)]
            if len(missing) == len(blocks):
                break
            blocks = missing
        for index in indices:
            if index not in blocks:
                self._block(index)
        return _Tail(start, count, blocks)

    def _used_end(self) -> int:
        """The cluster after the last one that is in use."""
        for index in reversed(range(len(self.table))):
            if self._block_offset(index) and (end := used_end(self._block(index))):
                return index * self._per_block + end
        return 0

    def _take_tail(self, tail: _Tail) -> Clusters:
        """All that must be in memory is, and the table has room."""
        for place, index in enumerate(tail.blocks, start=tail.start + tail.count):
            self._put_block(index, place)
        virgin = tail.start >= self._virgin_from
        end = tail.start + tail.count + len(tail.blocks)
        self._set(tail.start, self._codec.ones(end - tail.start))
        self._virgin_from = max(self._virgin_from, end)
        return Clusters(tail.start, tail.count, virgin)

    def _grow_table(self, entries: int) -> None:
        """Move the table to where it has room for ``entries`` and half as many again."""
        words_per_cluster = (1 << self._cluster_bits) // 8
        wanted = entries + entries // 2
        while True:
            count = -(-wanted // words_per_cluster)
            tail = self._tail(count)
            if not tail.blocks or tail.blocks[-1] < count * words_per_cluster:
                break
            wanted = tail.blocks[-1] + 1
        if count << self._cluster_bits > limits.QCOW2_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        old = Extent(self.table_offset, len(self.table) * 8)
        self.table.extend([0] * (count * words_per_cluster - len(self.table)))
        self.table_offset = tail.start << self._cluster_bits
        self.table_moved = True
        self._take_tail(tail)
        self.metadata.add_range(tail.start, tail.start + count)
        self.forget_metadata(old)

    def forget_metadata(self, extent: Extent) -> None:
        """A table was moved away from there: it is free once nothing in the file refers to it."""
        first = extent.offset >> self._cluster_bits
        end = -(-extent.end >> self._cluster_bits)
        self.metadata.remove_range(first, end)
        self.free(first, end - first)

    # -- giving back -------------------------------------------------------------------------

    def free(self, first: int, count: int) -> None:
        """One reference to each of the clusters is gone, once what says so is in the file.

        Until ``release`` they stay in use.
        """
        self._freed.append((first, count))
        if first <= (self.packed_end - 1) >> self._cluster_bits < first + count:
            self.packed_end = 0

    def give_back(self, first: int, count: int) -> None:
        """Clusters that were taken, and that nothing has ever named, are free again at once.

        So whoever takes more than he needs does not make the file longer.
        """
        end = first + count
        while first < end:
            part = min(end - first, self._per_block - first % self._per_block)
            try:
                self._lower(first, part)
            except _MissingBlock:
                self.free(first, part)
            first += part

    def abandon(self, first: int, count: int) -> None:
        """Like ``free``, but a write to the clusters may still be under way: at the end only."""
        self._abandoned.append((first, count))

    def free_abandoned(self) -> None:
        """No write is under way any more."""
        self._freed += self._abandoned
        self._abandoned = []

    def take_freed(self) -> list[tuple[int, int]]:
        """What was given to ``free`` since the last time."""
        freed, self._freed = self._freed, []
        return freed

    @property
    def freed_count(self) -> int:
        return len(self._freed)

    async def release(
        self, freed: list[tuple[int, int]], discard: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """Lower the counts of what nothing refers to any more; ``discard`` what becomes free.

        Raises ``OSError``, and then what is left in ``freed`` is still to be released.
        """
        while freed:
            first, count = freed[-1]
            self._file.debug_event("cluster_free")
            part = min(count, self._per_block - first % self._per_block)
            await self._change(partial(self._check_in_use, first, part))
            for start, length in self._last_references(first, part):
                await discard(start << self._cluster_bits, length << self._cluster_bits)
            await self._change(partial(self._lower, first, part))
            freed[-1:] = [(first + part, count - part)] if part < count else []

    def _check_in_use(self, first: int, count: int) -> None:
        """That the counts are in memory and none is 0; clusters of one block."""
        index, start = divmod(first, self._per_block)
        if not self._block_offset(index):
            raise CorruptImageError(f"the refcount of cluster {first} in use is 0")
        free = find_zero(self._block(index)[start : start + count], 0)
        if free >= 0:
            raise CorruptImageError(f"the refcount of cluster {first + free} in use is 0")

    def _last_references(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Runs of clusters that only one still refers to."""
        index, start = divmod(first, self._per_block)
        counts = self._block(index)[start : start + count]
        at = 0
        for single, group in itertools.groupby(counts, lambda each: each == 1):
            length = sum(1 for _ in group)
            if single:
                yield first + at, length
            at += length

    def _lower(self, first: int, count: int) -> None:
        index, start = divmod(first, self._per_block)
        counts = self._block(index)[start : start + count]
        for at, each in enumerate(counts):
            counts[at] = each - 1
        self._set(first, counts)
        free = find_zero(counts, 0)
        if free >= 0:
            self._cursor = min(self._cursor, first + free)

    # -- references to clusters that have some -----------------------------------------------

    async def add_reference(self, cluster: int) -> bool:
        """One more reference to a cluster in use; False where its count can't be higher."""
        return await self._change(lambda: self._raise(cluster))

    def _raise(self, cluster: int) -> bool:
        index, start = divmod(cluster, self._per_block)
        counts = self._block(index)
        if not 0 < counts[start] < self._codec.most:
            return False
        raised = counts[start : start + 1]
        raised[0] += 1
        self._set(cluster, raised)
        return True

    async def correct(self, index: int, counts: array[int]) -> None:
        """Give all clusters of one block the right counts. Raises ``BlockdError``, ``OSError``."""
        if index >= len(self.table) or not self._block_offset(index):
            if not any(counts):
                return
            raise BlockdError(NEEDS_REBUILDING)
        await self._change(lambda: self._block(index))
        if max(counts) > self._codec.most:
            raise BlockdError(NEEDS_REBUILDING)
        exact = self._codec.of(counts)
        if exact != self._block(index):
            self._set(index * self._per_block, exact)

    async def used_end(self) -> int:
        """The cluster after the last one that is in use."""
        return await self._change(self._used_end)
