"""Refcounts from what refers to the clusters, for an image that was not closed in order."""

from __future__ import annotations

import struct
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.block.qcow2.entries import COPIED, OFFSET_MASK, CorruptImageError, Geometry
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.refcounts import Refcounts
from blockd.block.qcow2.words import decode_words
from blockd.errors import BlockdError
from blockd.extent import Extent

#: A snapshot's entry up to its extra data, and a bitmap's up to its extra data
#: (specification, "Snapshots" and "Bitmap directory").
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")


@dataclass(slots=True)
class _References:
    """How often each cluster of the file is referred to."""

    cluster_bits: int
    per_block: int
    file_clusters: int
    blocks: dict[int, array[int]] = field(default_factory=dict)

    def add(self, clusters: range) -> None:
        """Raises ``CorruptImageError`` for clusters beyond the file's end."""
        if clusters and clusters[-1] >= self.file_clusters:
            raise CorruptImageError(f"cluster {clusters[-1]} is beyond the end of the file")
        at = clusters.start
        while at < clusters.stop:
            index, start = divmod(at, self.per_block)
            block = self.blocks.get(index)
            if block is None:
                block = self.blocks[index] = array("I", bytes(4 * self.per_block))
            end = min(start + clusters.stop - at, self.per_block)
            block[start:end] = array("I", [count + 1 for count in block[start:end]])
            at += end - start

    def add_extent(self, extent: Extent) -> None:
        if extent.length:
            bits = self.cluster_bits
            self.add(range(extent.offset >> bits, ((extent.end - 1) >> bits) + 1))


async def repair(file: HostFile, header: Header) -> None:
    """Give every cluster of the image the refcount that it should have.

    What is not referred to becomes free. The header is left as it is. Raises ``BlockdError``
    where the image's tables are damaged, ``OSError``.
    """
    try:
        await _Repair(file, header).run()
    except CorruptImageError as error:
        raise BlockdError(f"{error.strerror}; 'qemu-img check -r all' may repair it") from error


class _Repair:
    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._geometry = Geometry.of(header)
        self._references = _References(
            header.cluster_bits,
            header.refcount_block_entries,
            -(-file.node.size_bytes >> header.cluster_bits),
        )

    async def run(self) -> None:
        header, references = self._header, self._references
        references.add(range(1))
        await self._walk_l1(Extent(header.l1_table_offset, header.l1_size * 8))
        async for l1 in self._snapshots():
            await self._walk_l1(l1)
        await self._walk_bitmaps()
        table = await self._read_words(
            Extent(
                header.refcount_table_offset,
                header.refcount_table_clusters << header.cluster_bits,
            )
        )
        for word in table:
            if word & OFFSET_MASK:
                first = (word & OFFSET_MASK) >> header.cluster_bits
                references.add(range(first, first + 1))
        await self._correct(Refcounts(self._file, header, table, BitMap64()))

    async def _read_words(self, extent: Extent) -> array[int]:
        """A table, which is referred to once more."""
        self._references.add_extent(extent)
        return decode_words(await self._file.read_bytes(*extent))

    async def _walk_l1(self, extent: Extent) -> None:
        tables = [word & OFFSET_MASK for word in await self._read_words(extent)]
        tables = [offset for offset in tables if offset]
        if len(set(tables)) < len(tables):
            raise CorruptImageError("an L1 table names an L2 table twice")
        geometry = self._geometry
        for offset in tables:
            await trio.lowlevel.checkpoint()
            words = await self._read_words(Extent(offset, geometry.cluster_bytes))
            if self._header.has_data_file:
                continue
            for clusters in _runs(words, geometry):
                self._references.add(clusters)

    async def _snapshots(self) -> AsyncIterator[Extent]:
        """Each snapshot's L1 table."""
        start = at = self._header.snapshots_offset
        for _ in range(self._header.nb_snapshots):
            data = await self._file.read_bytes(at, _SNAPSHOT.size)
            offset, entries, id_bytes, name_bytes, *_, extra_bytes = _SNAPSHOT.unpack(data)
            if entries * 8 > limits.QCOW2_L1_TABLE_BYTES:
                raise CorruptImageError("a snapshot's L1 table is too large")
            yield Extent(offset, entries * 8)
            at += -(-(_SNAPSHOT.size + extra_bytes + id_bytes + name_bytes) // 8) * 8
        self._references.add_extent(Extent(start, at - start))

    async def _walk_bitmaps(self) -> None:
        bitmaps = self._header.extensions.bitmaps
        if bitmaps is None:
            return
        extent = Extent(bitmaps.directory_offset, bitmaps.directory_size_bytes)
        self._references.add_extent(extent)
        directory = await self._file.read_bytes(*extent)
        at = 0
        for _ in range(bitmaps.nb_bitmaps):
            if at + _BITMAP.size > len(directory):
                raise CorruptImageError("the bitmap directory is too short")
            offset, entries, *_, name_bytes, extra_bytes = _BITMAP.unpack_from(directory, at)
            if entries * 8 > limits.QCOW2_BITMAP_TABLE_BYTES:
                raise CorruptImageError("a bitmap table is too large")
            for word in await self._read_words(Extent(offset, entries * 8)):
                self._references.add(self._geometry.clusters(word & OFFSET_MASK))
            at += -(-(_BITMAP.size + extra_bytes + name_bytes) // 8) * 8

    async def _correct(self, refcounts: Refcounts) -> None:
        references = self._references
        zeroes = array("I", bytes(4 * references.per_block))
        present = {index for index, word in enumerate(refcounts.table) if word & OFFSET_MASK}
        for index in sorted(present | references.blocks.keys()):
            await refcounts.correct(index, references.blocks.get(index, zeroes))
            if refcounts.blocks.dirty_count:
                for change in refcounts.blocks.take_changes():
                    await self._file.write(change.offset, memoryview(change.data))
                refcounts.blocks.written()
        await self._file.node.flush()


def _runs(words: array[int], geometry: Geometry) -> Iterator[range]:
    """The clusters that a table's entries refer to; what entries name in order is one range."""
    run, more = range(0), 0
    next_word = 0
    for entry in words[:: geometry.entry_words]:
        if entry == next_word:
            # The last one's neighbour, or nothing after nothing.
            if entry:
                more += 1
                next_word += geometry.cluster_bytes
            continue
        if run:
            yield range(run.start, run.stop + more)
        run, more = geometry.clusters(entry), 0
        next_word = entry + geometry.cluster_bytes if entry & COPIED else 0
    if run:
        yield range(run.start, run.stop + more)
