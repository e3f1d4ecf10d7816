"""A driver over memory with a backing file: what it does not hold is read from there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from blockd.block import Allocation, Node, Role
from blockd.extent import Extent
from tests.helpers.memory_driver import MemoryDriver

PAGE_BYTES = 512


class MemoryOverlay(MemoryDriver):
    """Pages that were written, and the backing node under the others.

    Nothing of it is done at once; the backing node may be shorter.
    """

    supports_backing = True

    def __init__(self, size_bytes: int, backing: Node | None, file: Node | None = None) -> None:
        """``file``: a node that stands below for nothing but to be there."""
        super().__init__(size_bytes, page_bytes=PAGE_BYTES)
        self.name = "overlay"
        self.filename = "/overlay.img"
        self.backing = backing
        self.file = file
        self.held: set[int] = set()

    @property
    def children(self) -> Mapping[Role, Node]:
        children = {Role.FILE: self.file, Role.BACKING: self.backing}
        return {role: child for role, child in children.items() if child is not None}

    def replace_child(self, role: Role, node: Node | None) -> None:
        assert role in (Role.FILE, Role.BACKING)
        if role is Role.FILE:
            self.file = node
        else:
            self.backing = node

    async def read(self, offset: int, view: memoryview) -> None:
        await super().read(offset, view)
        if self.backing is not None:
            end = min(offset + len(view), self.backing.size_bytes)
            for start, stop in self._gaps(offset, end):
                await self.backing.read(start, view[start - offset : stop - offset])

    def _gaps(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs within a range that the pages held leave out."""
        pages = range(offset // PAGE_BYTES, -(-end // PAGE_BYTES))
        for held, run in itertools.groupby(pages, lambda page: page in self.held):
            if not held:
                first, *others = run
                last = others[-1] if others else first
                yield max(first * PAGE_BYTES, offset), min((last + 1) * PAGE_BYTES, end)

    async def write(self, offset: int, view: memoryview) -> None:
        await self._keep_edges(offset, len(view))
        await super().write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._keep_edges(offset, length)
        await super().write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length, unmap=True)

    async def truncate(self, size_bytes: int) -> None:
        """What is added reads as zeroes, whatever the backing file has there."""
        old_size = self.size_bytes
        if old_size % PAGE_BYTES:
            await self._keep_edges(old_size - 1, 1)
        await super().truncate(size_bytes)
        self.held.update(range(-(-old_size // PAGE_BYTES), -(-size_bytes // PAGE_BYTES)))

    async def _keep_edges(self, offset: int, length: int) -> None:
        """Hold the pages of a range, the parts beside it as they read now."""
        first, end = offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)
        for page in {first, end - 1} - self.held:
            start = page * PAGE_BYTES
            view = memoryview(bytearray(min(PAGE_BYTES, self.size_bytes - start)))
            await self.read(start, view)
            self.data[start : start + len(view)] = view
        self.held.update(range(first, end))

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        runs: list[Allocation] = []
        end = offset + length
        while offset < end:
            stop = min((offset // PAGE_BYTES + 1) * PAGE_BYTES, end)
            runs += await self._page(Extent(offset, stop - offset))
            offset = stop
        return runs

    async def _page(self, extent: Extent) -> Sequence[Allocation]:
        if extent.offset // PAGE_BYTES in self.held:
            return await super().allocation(*extent)
        if self.backing is None or extent.end > self.backing.size_bytes:
            return [Allocation(extent, zero=True, depth=0)]
        below = await self.backing.allocation(*extent)
        return [each._replace(depth=each.depth and each.depth + 1) for each in below]
