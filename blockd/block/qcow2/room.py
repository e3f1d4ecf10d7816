"""The image as its bitmaps use it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from pyroaring import BitMap64

from blockd.block.qcow2.header import Header
from blockd.block.qcow2.image import Changes, Image


class ImageRoom:
    """An open image's clusters and header, in bytes. The async calls raise ``OSError``."""

    def __init__(
        self,
        image: Callable[[], Image],
        changing: Callable[[], AbstractAsyncContextManager[Changes]],
        tell_damage: Callable[[str], None],
    ) -> None:
        """``image``: gives the image as it is now; it has no ``changes`` once it is only read.

        ``changing``: its body changes the image, and deals with damage that it meets there.
        ``tell_damage``: told why there are no bitmaps, though the image has some.
        """
        self._image = image
        self._changing = changing
        self.tell_damage = tell_damage
        self._claimed = BitMap64()

    @property
    def header(self) -> Header:
        """As it stands in the file."""
        image = self._image()
        return image.header if image.changes is None else image.changes.metadata.header

    @property
    def size_bytes(self) -> int:
        """The disk's size, which a header has only after a flush."""
        image = self._image()
        changes = image.changes
        return image.header.size_bytes if changes is None else changes.metadata.size_bytes

    @property
    def file_size_bytes(self) -> int:
        return self._image().file.node.size_bytes

    @property
    def read_only(self) -> bool:
        return self._image().changes is None

    @property
    def metadata(self) -> BitMap64:
        """The clusters of tables, which nothing else may use; those of bitmaps are added to it."""
        changes = self._image().changes
        return self._claimed if changes is None else changes.writer.refcounts.metadata

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self._image().file.read_bytes(offset, length))

    async def write(self, offset: int, data: bytes) -> None:
        await self._image().file.write(offset, memoryview(data))

    async def allocate(self, length: int) -> int:
        """Take whole clusters that follow each other; the offset of the first."""
        async with self._changing() as changes:
            refcounts, count = changes.writer.refcounts, len(self.header.clusters_of(0, length))
            clusters = await refcounts.allocate(count)
            if clusters.count < count:
                refcounts.give_back(clusters.first, clusters.count)
                clusters = await refcounts.allocate_all(count)
            refcounts.metadata.add_range(clusters.first, clusters.first + count)
            return clusters.first << self.header.cluster_bits

    def free(self, offset: int, length: int) -> None:
        """Give clusters back, which nothing in the file refers to any more."""
        changes = self._image().changes
        if changes is None:
            return  # it was found to be corrupt meanwhile, and is left as it is
        clusters = self.header.clusters_of(offset, length)
        refcounts = changes.writer.refcounts
        refcounts.metadata.remove_range(clusters.start, clusters.stop)
        refcounts.free(clusters.start, len(clusters))

    async def flush(self) -> None:
        """Return when all that was written and allocated is on stable storage."""
        async with self._changing() as changes:
            await changes.metadata.flush()

    async def change_header(
        self, change: Callable[[Header], Header], *, leaks: bool = False
    ) -> None:
        """Bring the header as ``change`` makes it to stable storage.

        ``leaks``: what only the old one led to is to be found, and freed, at the next open.
        """
        async with self._changing() as changes:
            changes.metadata.leaks |= leaks
            await changes.metadata.change_header(change)
