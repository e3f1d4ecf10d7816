"""Zeroes and discards: whole clusters by their entries, the rest by writing zeroes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from blockd.block.qcow2.entries import (
    ALL_SUBCLUSTERS,
    OFFSET_MASK,
    ZERO,
    own_host,
)
from blockd.block.qcow2.header import SUBCLUSTERS
from blockd.block.qcow2.reading import Reader
from blockd.block.qcow2.tables import Table
from blockd.block.qcow2.writing import Writer

_ZEROES = bytes(1 << 21)


@dataclass(slots=True)
class Zeroer:
    """Makes ranges read as zeroes: what was written by entries that say so, whatever is below.

    ``flags``: entries can say "zero" (version 3). Where they can't, a cluster loses its place,
    which is zero only where no backing file shows through.
    """

    writer: Writer
    reader: Reader
    flags: bool
    #: The external data file must have the content by itself.
    raw_data: bool

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeroes. Raises ``OSError``."""
        first, end = self._whole_clusters(offset, length)
        bits = self.writer.mapping.geometry.cluster_bits
        if first >= end or self.raw_data or not self._can_flag(first, end):
            await self._write_zero_bytes(offset, length, unmap=unmap)
            return
        if offset < first << bits:
            await self._write_zero_bytes(offset, (first << bits) - offset, unmap=unmap)
        await self._change_clusters(first, end, keep=not unmap, held=self.flags)
        if end << bits < offset + length:
            await self._write_zero_bytes(end << bits, offset + length - (end << bits), unmap=unmap)

    def is_fast(self, offset: int, length: int) -> bool:
        """Whether ``write_zeroes`` of the range only changes entries."""
        first, end = self._whole_clusters(offset, length)
        bits = self.writer.mapping.geometry.cluster_bits
        whole = offset == first << bits and offset + length <= end << bits
        return whole and not self.raw_data and self._can_flag(first, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give up the whole clusters in the range; they read as zeroes, or are left as they are."""
        first, end = self._whole_clusters(offset, length)
        if self.raw_data:
            await self._write_zero_bytes(offset, length, unmap=True)
        elif first < end and self._can_flag(first, end):
            await self._change_clusters(first, end, keep=False, held=False)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that lie in the range; the image's end counts as one's."""
        bits = self.writer.mapping.geometry.cluster_bits
        end = offset + length
        if end >= self.writer.metadata.size_bytes:
            end += (1 << bits) - 1
        return -(-offset >> bits), end >> bits

    def _can_flag(self, first: int, end: int) -> bool:
        bits = self.writer.mapping.geometry.cluster_bits
        return self.flags or not self.reader.inside_backing(first << bits, (end - first) << bits)

    async def _write_zero_bytes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Write them, but where the range reads as zeroes already."""
        end = offset + length
        while offset < end:
            run = await self.writer.mapping.find(offset, min(end - offset, len(_ZEROES)))
            if self.raw_data or not await self.reader.reads_as_zeroes(offset, run.length):
                await self.writer.write(offset, memoryview(_ZEROES)[: run.length])
            offset += run.length

    # -- by entries --------------------------------------------------------------------------

    async def _change_clusters(self, first: int, end: int, *, keep: bool, held: bool) -> None:
        """``keep`` their places; ``held``: also where nothing is, the image itself says zero."""
        mapping, busy = self.writer.mapping, self.writer.busy
        entries = mapping.geometry.l2_entries
        while first < end:
            index = first // entries
            stop = min(end, (index + 1) * entries)
            shown = held or self._shows_backing(first, stop)
            if not mapping.l1[index] & OFFSET_MASK and not shown:
                first = stop
                continue
            table = await mapping.writable(index)
            free = busy.clip(first, stop)
            if free:
                self._change_entries(table, first, first + free, keep=keep, held=held)
                first += free
            else:
                await busy.wait(first, first + 1)
            if self.writer.metadata.over_limit:
                await self.writer.metadata.flush()

    async def unmap_clusters(self, first: int, end: int) -> None:
        """Free the clusters and leave their entries empty; nobody looks at them any more."""
        mapping = self.writer.mapping
        geometry = mapping.geometry
        while first < end:
            index = first // geometry.l2_entries
            stop = min(end, (index + 1) * geometry.l2_entries)
            if mapping.l1[index] & OFFSET_MASK:
                table = await mapping.writable(index)
                start = first % geometry.l2_entries
                words = geometry.entry_words
                for at in range(start * words, (start + stop - first) * words, words):
                    self.writer.forget(table.words[at])
                    table.words[at : at + words] = array("Q", bytes(8 * words))
                mapping.mark(index, table, start, start + stop - first)
            first = stop

    def _shows_backing(self, first: int, end: int) -> bool:
        bits = self.writer.mapping.geometry.cluster_bits
        return bool(self.reader.inside_backing(first << bits, (end - first) << bits))

    def _change_entries(
        self, table: Table, first: int, end: int, *, keep: bool, held: bool
    ) -> None:
        geometry = self.writer.mapping.geometry
        index = first % geometry.l2_entries
        change = self._zero_extended if geometry.extended else self._zero_standard
        for at in range(index, index + end - first):
            cluster = first + at - index
            shown = held or self._shows_backing(cluster, cluster + 1)
            change(table.words, at, keep=keep, shown=shown)
        self.writer.mapping.mark(first // geometry.l2_entries, table, index, index + end - first)

    def _zero_standard(self, words: array[int], at: int, *, keep: bool, shown: bool) -> None:
        entry = words[at]
        geometry = self.writer.mapping.geometry
        if geometry.is_unallocated(entry):
            words[at] = ZERO if shown else entry
        elif self.flags and keep and own_host(geometry, entry) is not None:
            words[at] = entry | ZERO
        else:
            self.writer.forget(entry)
            words[at] = ZERO if self.flags else 0

    def _zero_extended(self, words: array[int], at: int, *, keep: bool, shown: bool) -> None:
        entry, bitmap = words[2 * at], words[2 * at + 1]
        geometry = self.writer.mapping.geometry
        if geometry.is_unallocated(entry) and not bitmap and not shown:
            return
        if not keep or own_host(geometry, entry) is None:
            self.writer.forget(entry)
            words[2 * at] = 0
        words[2 * at + 1] = ALL_SUBCLUSTERS << SUBCLUSTERS
