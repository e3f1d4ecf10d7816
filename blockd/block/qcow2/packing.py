"""Writing compressed clusters, which lie one behind the other and share the file's clusters."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

import trio

from blockd.block.qcow2.compressed import compress
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.writing import Writer


@dataclass(slots=True)
class Packer:
    """Compresses what is written, and finds it room down to the byte."""

    writer: Writer
    file: HostFile
    compression: CompressionType
    _one: trio.Lock = field(default_factory=trio.Lock)

    async def write(self, offset: int, view: memoryview) -> None:
        """Write clusters compressed; those that get no smaller as they are. Raises ``OSError``."""
        cluster_bytes = self.writer.mapping.geometry.cluster_bytes
        for at in range(0, len(view), cluster_bytes):
            piece = view[at : at + cluster_bytes]
            content = bytes(piece).ljust(cluster_bytes, b"\0")
            packed = await trio.to_thread.run_sync(compress, self.compression, content)
            if packed is None:
                await self.writer.write(offset + at, piece)
            else:
                await self._store(offset + at, packed)

    async def _store(self, offset: int, packed: bytes) -> None:
        writer = self.writer
        geometry = writer.mapping.geometry
        cluster = offset >> geometry.cluster_bits
        while not writer.busy.clip(cluster, cluster + 1):
            await writer.busy.wait(cluster, cluster + 1)
        with writer.busy.hold(cluster, cluster + 1):
            async with self._one:
                host = await self._find_room(len(packed))
            entry = geometry.compressed_entry(host, len(packed))
            self.file.debug_event("write_compressed")
            try:
                await self.file.write(host, memoryview(packed))
                table = await writer.mapping.writable(offset >> geometry.reach_bits)
            except OSError:
                writer.forget(entry)
                raise
            except BaseException:
                # A cancelled write may still be on its way there.
                clusters = geometry.clusters(entry)
                writer.refcounts.abandon(clusters.start, len(clusters))
                raise
            self.file.debug_event("l2_update_compressed")
            writer.link_compressed(table, cluster, entry)
        if writer.metadata.over_limit:
            await writer.metadata.flush()

    async def _find_room(self, length: int) -> int:
        """Bytes of the file that are not in use, in clusters that count this use of them."""
        bits = self.writer.mapping.geometry.cluster_bits
        refcounts = self.writer.refcounts
        start = refcounts.packed_end
        room = -start & ((1 << bits) - 1)
        if room < length:
            fresh = await refcounts.allocate(1)
            if not room or fresh.first << bits != start + room or start != refcounts.packed_end:
                return self._put_at(fresh.first << bits, length)
            if await refcounts.add_reference(start >> bits):
                return self._put_at(start, length)
            return self._put_at(fresh.first << bits, length)
        if start == refcounts.packed_end and await refcounts.add_reference(start >> bits):
            return self._put_at(start, length)
        fresh = await refcounts.allocate(1)
        return self._put_at(fresh.first << bits, length)

    def _put_at(self, start: int, length: int) -> int:
        if start + length > self.writer.mapping.geometry.compressed_limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.writer.refcounts.packed_end = start + length
        return start
