"""Making an image in a file: by any kill or power cut it is not there yet, or there and whole."""

from __future__ import annotations

from typing import Protocol

from blockd import limits
from blockd.block.qcow2.image_options import ImageOptions, Preallocation
from blockd.block.qcow2.layout import plan_image
from blockd.extent import Extent

_ZEROES = memoryview(bytes(limits.MIB))


class Storage(Protocol):
    """What an image is made in: a node, or a driver's like."""

    @property
    def size_bytes(self) -> int: ...
    async def resize(self, size_bytes: int) -> None: ...
    async def write(self, offset: int, view: memoryview) -> None: ...
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None: ...
    async def flush(self) -> None: ...


async def create_image(
    file: Storage, options: ImageOptions, data_file: Storage | None = None
) -> None:
    """Make ``file`` a new image; what was there before is lost. On return it is durable.

    ``data_file`` gets the data, where ``options`` names one; it keeps what is in it, as far as
    the image's size. The header is written last, and only over zeroes that are durable: tables
    of this image under the header of another one would be a damaged image.

    Raises ``BlockdError`` where the options forbid it, having changed nothing; ``OSError``.
    """
    layout = plan_image(options)
    header = layout.header.build()
    assert (data_file is not None) == layout.header.has_data_file
    old_bytes = await _grow(file, layout.end)
    await file.write_zeroes(0, len(header), unmap=False)
    await file.flush()
    for offset, piece in layout.tables():
        await file.write(offset, memoryview(piece))
    if data_file is None:
        stale = Extent(layout.data.offset, max(min(old_bytes, layout.end) - layout.data.offset, 0))
        await _preallocate(file, layout.data, layout.preallocation, stale)
    else:
        await _adopt(data_file, options.size_bytes, layout.preallocation)
    await file.flush()
    await file.write(0, memoryview(header))
    await file.flush()


async def _grow(file: Storage, size_bytes: int) -> int:
    """Make the file large enough; the size that it had."""
    old_bytes = file.size_bytes
    if old_bytes < size_bytes:
        await file.resize(size_bytes)
    return old_bytes


async def _adopt(data_file: Storage, size_bytes: int, preallocation: Preallocation) -> None:
    """What is in a data file may be wanted: a raw one shows it. Only what is new is prepared."""
    old_bytes = data_file.size_bytes
    if old_bytes != size_bytes:
        await data_file.resize(size_bytes)
    new = Extent(old_bytes, max(size_bytes - old_bytes, 0))
    await _preallocate(data_file, new, preallocation, Extent(0, 0))
    await data_file.flush()


async def _preallocate(
    file: Storage, data: Extent, preallocation: Preallocation, stale: Extent
) -> None:
    """Make room for the data that the tables speak of. ``stale`` of it is not zero yet."""
    if preallocation is Preallocation.FULL:
        for offset in range(data.offset, data.end, len(_ZEROES)):
            await file.write(offset, _ZEROES[: data.end - offset])
    elif preallocation is Preallocation.FALLOC and data.length:
        await file.write_zeroes(data.offset, data.length, unmap=False)
    elif preallocation is Preallocation.METADATA and stale.length:
        await file.write_zeroes(stale.offset, stale.length, unmap=True)
