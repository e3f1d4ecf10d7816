"""Where the guest's bytes are: the L1 table and the L2 tables below it."""

from __future__ import annotations

from array import array

from blockd import limits
from blockd.block.qcow2.entries import (
    COPIED,
    OFFSET_MASK,
    CorruptImageError,
    Geometry,
    Kind,
    Run,
    find_run,
)
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.refcounts import Refcounts
from blockd.block.qcow2.tables import Table, TableCache
from blockd.block.qcow2.words import decode_words, encode_words


class Mapping:
    """The active L1 table as a whole, and the L2 tables that fit into the cache.

    An L2 table is changed only where ``writable`` gave it and before the next await.
    """

    def __init__(
        self, file: HostFile, header: Header, l1: array[int], refcounts: Refcounts
    ) -> None:
        self.geometry = Geometry.of(header)
        self.l1 = l1
        self.l1_offset = header.l1_table_offset
        #: Whether the whole L1 table is to be written, because it moved.
        self.l1_moved = False
        self.dirty_entries: set[int] = set()
        self._file = file
        self._refcounts = refcounts
        cluster_bytes = header.cluster_size_bytes
        self._reach_bytes = 1 << self.geometry.reach_bits
        geometry = self.geometry
        self._reach_bits = geometry.reach_bits
        self._cluster_bits = geometry.cluster_bits
        self._inside_mask = geometry.cluster_bytes - 1
        self._index_mask = geometry.l2_entries - 1
        #: No entry with one of these is plain; of extended ones that can't be told so.
        self._plain_mask = ~0 if geometry.extended else geometry.not_data_mask
        self.tables = TableCache(
            cluster_bytes,
            max(limits.QCOW2_L2_CACHE_BYTES // cluster_bytes, limits.QCOW2_CACHE_TABLES_MIN),
            self._read_table,
            encode_words,
        )

    async def _read_table(self, offset: int) -> array[int]:
        self._file.debug_event("l2_load")
        return decode_words(await self._file.read_bytes(offset, self.geometry.cluster_bytes))

    # -- looking up --------------------------------------------------------------------------

    def find_nowait(self, offset: int, length: int) -> Run | None:
        """How the bytes from ``offset`` on are mapped; None where a table must be read for that.

        Raises ``CorruptImageError``.
        """
        index = offset >> self.geometry.reach_bits
        if not self.l1[index] & OFFSET_MASK:
            return self._without_table(index, offset, length)
        table = self.tables.tables.get(index)
        if table is None:
            return None
        table.touched = True
        return find_run(table.words, self.geometry, offset, length)

    def find_cluster(self, offset: int, length: int, flags: int = 0) -> int | None:
        """Where bytes lie that are within one plain data cluster; None where they may not be.

        The short way for small requests, by a table that is in memory; ``flags``: what the entry
        must have besides an offset.
        """
        table = self.tables.tables.get(offset >> self._reach_bits)
        inside = offset & self._inside_mask
        if table is None or inside + length > self._inside_mask + 1:
            return None
        entry = table.words[(offset >> self._cluster_bits) & self._index_mask]
        if entry & self._plain_mask or entry & flags != flags or not entry & OFFSET_MASK:
            return None
        table.touched = True
        return (entry & OFFSET_MASK) + inside

    async def find(self, offset: int, length: int) -> Run:
        """How the first of the bytes is mapped, and how many of the others alike.

        Raises ``OSError``.
        """
        run = self.find_nowait(offset, length)
        if run is None:
            table = await self.load(offset >> self.geometry.reach_bits)
            assert table is not None
            run = find_run(table.words, self.geometry, offset, length)
        return run

    def _without_table(self, index: int, offset: int, length: int) -> Run:
        end = index + 1
        last = (offset + length - 1) >> self.geometry.reach_bits
        while end <= last and not self.l1[end] & OFFSET_MASK:
            end += 1
        return Run(Kind.UNALLOCATED, min((end * self._reach_bytes) - offset, length), 0)

    async def load(self, index: int) -> Table | None:
        """The L2 table of an L1 entry; None where there is none. Raises ``OSError``."""
        offset = self.l1[index] & OFFSET_MASK
        if not offset:
            return None
        table = self.tables.peek(index)
        if table is not None:
            return table
        if offset & (self.geometry.cluster_bytes - 1):
            raise CorruptImageError(f"L2 table offset {offset:#x} is not aligned")
        if offset >= self._file.node.size_bytes:
            raise CorruptImageError(f"L2 table offset {offset:#x} is beyond the end of the file")
        return await self.tables.load(index, offset)

    # -- changing ----------------------------------------------------------------------------

    def writable_nowait(self, index: int) -> Table | None:
        """The L2 table of an L1 entry, where it is in memory and may be changed in place."""
        if not self.l1[index] & COPIED:
            return None
        return self.tables.peek(index)

    async def writable(self, index: int) -> Table:
        """The L2 table of an L1 entry, made or copied where it may not be changed in place.

        It is the caller's until its next await. Raises ``OSError``.
        """
        while True:
            entry = self.l1[index]
            table = await self.load(index)
            if table is not None and entry & COPIED:
                return table
            new = await self._refcounts.allocate(1)
            self._file.debug_event("l2_alloc_write")
            if self.l1[index] == entry:
                return self._put(index, new.first, table)
            self._refcounts.free(new.first, 1)

    def _put(self, index: int, cluster: int, old: Table | None) -> Table:
        geometry = self.geometry
        if old is None:
            words = array("Q", bytes(geometry.cluster_bytes))
        else:
            # The clusters keep their references: the old table goes on having its own to them.
            words = old.words[:]
            first = old.offset >> geometry.cluster_bits
            self._refcounts.metadata.discard(first)
            self._refcounts.free(first, 1)
            self.tables.drop(index)
        self._refcounts.metadata.add(cluster)
        offset = cluster << geometry.cluster_bits
        self.set_l1(index, offset | COPIED)
        return self.tables.put(index, offset, words)

    def move_l1(self, offset: int, entries: int) -> None:
        """Let the L1 table be at another place, with more entries."""
        self.l1.extend([0] * (entries - len(self.l1)))
        self.l1_offset = offset
        self.l1_moved = True

    def drop_table(self, index: int) -> None:
        """Free an L2 table; what its entries named was freed before."""
        cluster = (self.l1[index] & OFFSET_MASK) >> self.geometry.cluster_bits
        self.tables.drop(index)
        self._refcounts.metadata.discard(cluster)
        self._refcounts.free(cluster, 1)
        self.set_l1(index, 0)

    def set_l1(self, index: int, entry: int) -> None:
        self.l1[index] = entry
        self.dirty_entries.add(index)

    def mark(self, index: int, table: Table, first: int, end: int) -> None:
        """The table's entries from ``first`` up to ``end`` have changed."""
        words = self.geometry.entry_words
        self.tables.mark(index, table, first * words, end * words)
