"""An image around its bitmaps, with the simplest allocator there can be: one refcount block."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from pyroaring import BitMap64

from blockd.block.qcow2.header import Header
from blockd.block.qcow2.parsing import HEADER_BYTES, parse_header


class FileRoom:
    """``Room`` over a small image of qemu-img. ``writes_left``: a crash comes after so many."""

    def __init__(self, path: Path, *, read_only: bool = False, writes_left: int = -1) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self.file_size_bytes = os.fstat(self._fd).st_size
        self.header = parse_header(os.pread(self._fd, HEADER_BYTES, 0), self.file_size_bytes)
        self.size_bytes = self.header.size_bytes
        self.read_only = read_only
        self._writes_left = writes_left
        (self._block,) = struct.unpack(">Q", os.pread(self._fd, 8, self._table))
        assert self.header.refcount_order == 4
        self._freed: list[tuple[int, int]] = []
        #: What was told of damage, and whether the next open is to look for leaks.
        self.damage: list[str] = []
        self.leaks = False
        self.metadata = BitMap64([0])
        tables = (self._table, 1), (self.header.l1_table_offset, self.header.l1_size * 8)
        for offset, length in (*tables, (self._block, 1)):
            clusters = self.header.clusters_of(offset, length)
            self.metadata.add_range(clusters.start, clusters.stop)

    @property
    def _table(self) -> int:
        return self.header.refcount_table_offset

    def close(self) -> None:
        for offset, length in self._freed:
            self._count(offset, length, -1)
        os.close(self._fd)

    def _count(self, offset: int, length: int, change: int) -> None:
        bits = self.header.cluster_bits
        for cluster in range(offset >> bits, -(-(offset + length) >> bits)):
            at = self._block + 2 * cluster
            (count,) = struct.unpack(">H", os.pread(self._fd, 2, at))
            os.pwrite(self._fd, struct.pack(">H", count + change), at)

    async def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset).ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        if not self._writes_left:
            raise CrashError
        self._writes_left -= 1
        os.pwrite(self._fd, data, offset)

    async def allocate(self, length: int) -> int:
        """Always behind all that is used."""
        cluster = self.header.cluster_size_bytes
        counts = os.pread(self._fd, self.header.refcount_block_entries * 2, self._block)
        used = len(counts.rstrip(b"\0"))
        offset = -(-used // 2) * cluster
        self._count(offset, length, 1)
        self.file_size_bytes = max(self.file_size_bytes, offset + length)
        os.ftruncate(self._fd, self.file_size_bytes)
        return offset

    def free(self, offset: int, length: int) -> None:
        self._freed.append((offset, length))

    def tell_damage(self, reason: str) -> None:
        self.damage.append(reason)

    async def flush(self) -> None:
        """All is there at once."""

    async def change_header(
        self, change: Callable[[Header], Header], *, leaks: bool = False
    ) -> None:
        self.leaks |= leaks
        header = change(self.header)
        await self.write(0, header.build())
        self.header = header


class CrashError(Exception):
    """Nothing from this write on happened."""
