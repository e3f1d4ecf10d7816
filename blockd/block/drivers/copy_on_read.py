"""``copy-on-read``: what is read from a backing image is kept in the image above it."""

from __future__ import annotations

from blockd.block.allocation import Allocation
from blockd.block.drivers.filter import Filter
from blockd.block.inflight import Reservations
from blockd.block.node import Node
from blockd.block.permissions import Access, Perm, Role
from blockd.errors import WouldBlock
from blockd.extent import Extent


class CopyOnReadDriver(Filter):
    """Copies before it reads; from then on the backing images are no longer asked.

    A copy holds its range, so that it never overwrites what a guest writes meanwhile: all writes
    to the child must come this way.
    """

    name = "copy-on-read"
    passes_compressed = True
    passes_descriptors = False
    writes_at_reads = True

    def __init__(
        self, child: Node, *, read_only: bool = False, depth_max: int | None = None
    ) -> None:
        """``depth_max``: images further down than this are read and not copied."""
        super().__init__(child, read_only=read_only)
        self._depth_max = depth_max
        self._copying = Reservations()

    def child_access(self, role: Role, access: Access) -> Access:
        """It writes whatever its own users do, and nobody else may."""
        return Access(access.needs | Perm.WRITE, access.shares & ~Perm.WRITE)

    def read_nowait(self, offset: int, view: memoryview) -> None:
        # Whether there is anything to copy can't be known at once.
        raise WouldBlock

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if self._copying:
            raise WouldBlock
        self.child.write_nowait(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        for run in await self._runs(self._whole_clusters(offset, len(view))):
            if self._is_to_be_copied(run):
                await self._keep(run.extent)
        await self.child.read(offset, view)

    async def _runs(self, extent: Extent) -> list[Allocation]:
        runs: list[Allocation] = []
        at = extent.offset
        while at < extent.end:
            runs += await self.child.allocation(at, extent.end - at)
            at = runs[-1].extent.end
        return runs

    def _whole_clusters(self, offset: int, length: int) -> Extent:
        unit = self.cluster_size_bytes or 1
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, self.size_bytes)
        return Extent(start, end - start)

    def _is_to_be_copied(self, run: Allocation) -> bool:
        return run.depth > 1 and (self._depth_max is None or run.depth <= self._depth_max)

    async def _keep(self, extent: Extent) -> None:
        async with self._copying.reserve(extent):
            # A guest may have written there before the range was ours.
            for run in await self._runs(extent):
                if self._is_to_be_copied(run):
                    await self._copy(run)

    async def _copy(self, run: Allocation) -> None:
        offset, length = run.extent.offset, run.extent.length
        if run.zero:
            await self.child.write_zeroes(offset, length, unmap=True)
            return
        view = memoryview(bytearray(length))
        await self.child.read(offset, view)
        await self.child.write(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        async with self._copying.reserve(Extent(offset, len(view))):
            await super().write(offset, view)

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        async with self._copying.reserve(Extent(offset, len(view))):
            await super().write_compressed(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        async with self._copying.reserve(Extent(offset, length)):
            await super().write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        async with self._copying.reserve(Extent(offset, length)):
            await super().discard(offset, length)
