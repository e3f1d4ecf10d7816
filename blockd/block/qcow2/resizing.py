"""Giving an image another size."""

from __future__ import annotations

from dataclasses import dataclass

from blockd import limits
from blockd.block.qcow2.entries import OFFSET_MASK
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.writing import Writer
from blockd.block.qcow2.zeroing import Zeroer
from blockd.errors import BlockdError
from blockd.extent import Extent

_SECTOR_BYTES = 512


@dataclass(slots=True)
class Resizer:
    """Grows and shrinks. No other request is under way."""

    writer: Writer
    zeroer: Zeroer

    async def resize(self, size_bytes: int) -> None:
        """Make the image that large; what is added reads as zeroes.

        Raises ``BlockdError`` where it can't be so, ``OSError``.
        """
        metadata = self.writer.metadata
        self._check(metadata.header, size_bytes)
        old = metadata.size_bytes
        if size_bytes < old:
            await self._free_end(size_bytes, old)
        else:
            await self._grow_l1(size_bytes)
        if self.writer.external:
            await self.writer.data_file.node.resize(size_bytes)
        metadata.size_bytes = size_bytes
        try:
            if size_bytes > old:
                await self._zero_end(old, size_bytes)
            await metadata.flush()
        except BaseException:
            # Those above go on with the old size, so that is what the header must have.
            metadata.size_bytes = old
            raise

    def _check(self, header: Header, size_bytes: int) -> None:
        if size_bytes % _SECTOR_BYTES:
            raise BlockdError("The new size must be a multiple of 512")
        if header.nb_snapshots and header.version < 3:
            raise BlockdError("Can't resize a v2 image which has snapshots")
        if header.l1_entries_for(size_bytes) * 8 > limits.QCOW2_L1_TABLE_BYTES:
            raise BlockdError("The new size is too large for the image's cluster size")

    async def _grow_l1(self, size_bytes: int) -> None:
        mapping, metadata = self.writer.mapping, self.writer.metadata
        entries = metadata.header.l1_entries_for(size_bytes)
        if entries <= len(mapping.l1):
            return
        bits = metadata.header.cluster_bits
        self.writer.reader.file.debug_event("l1_grow_alloc_table")
        clusters = await self.writer.refcounts.allocate_all(-(-entries * 8 >> bits))
        old = Extent(mapping.l1_offset, len(mapping.l1) * 8)
        mapping.move_l1(clusters.first << bits, entries)
        self.writer.refcounts.metadata.add_range(clusters.first, clusters.first + clusters.count)
        if old.length:
            self.writer.refcounts.forget_metadata(old)

    async def _zero_end(self, old: int, size_bytes: int) -> None:
        """What was cut off once, or lies in a longer backing file, must not be seen again."""
        cluster_bytes = self.writer.mapping.geometry.cluster_bytes
        end = -(-old // cluster_bytes) * cluster_bytes
        backing = self.writer.reader.backing
        end = max(end, backing.size_bytes if backing is not None else 0)
        end = min(end, size_bytes)
        if old < end:
            await self.zeroer.write_zeroes(old, end - old, unmap=True)

    async def _free_end(self, size_bytes: int, old: int) -> None:
        geometry = self.writer.mapping.geometry
        first = -(-size_bytes // geometry.cluster_bytes)
        end = -(-old // geometry.cluster_bytes)
        await self.zeroer.unmap_clusters(first, end)
        mapping = self.writer.mapping
        for index in range(-(-size_bytes >> geometry.reach_bits), len(mapping.l1)):
            if mapping.l1[index] & OFFSET_MASK:
                mapping.drop_table(index)
