"""O_DIRECT (``cache.direct``): aligned I/O through scratch memory, always in threads."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from blockd import limits
from blockd.block.drivers import blocking
from blockd.block.drivers.file import FileDriver
from blockd.block.inflight import Reservations
from blockd.errors import BlockdError, WouldBlock
from blockd.extent import Extent


class DirectFileDriver(FileDriver):
    """Like ``FileDriver``, past the page cache.

    A write that covers blocks in part reads them first; so that no other write to the same
    blocks is lost in between, every write reserves the blocks it touches.
    """

    direct = True

    def __init__(
        self, fd: int, *, filename: str, read_only: bool, unmap: bool, flushes: bool
    ) -> None:
        super().__init__(fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes)
        _set_direct(fd, filename)
        self._alignment_bytes = _alignment(fd)
        self._reservations = Reservations()

    # By a descriptor it would have to be aligned.

    def descriptor(self) -> None:
        return None

    @property
    def takes_write_by(self) -> bool:
        return False

    def read_nowait(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    def write_nowait(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    def _blocks(self, offset: int, length: int) -> Extent:
        align = self._alignment_bytes
        start = offset // align * align
        return Extent(start, -(-(offset + length) // align) * align - start)

    async def read(self, offset: int, view: memoryview) -> None:
        def call() -> None:
            for part, piece in _pieces(offset, view):
                blocks = self._blocks(part, len(piece))
                memory = _scratch(blocks.length)
                self._read_blocks(blocks.offset, memory)
                skip = part - blocks.offset
                piece[:] = memory[skip : skip + len(piece)]

        await self._in_thread(call)

    async def write(self, offset: int, view: memoryview) -> None:
        async with self._reservations.reserve(self._blocks(offset, len(view))):
            await self._in_thread(lambda: self._write(offset, view))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        async with self._reservations.reserve(self._blocks(offset, length)):
            await super().write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        async with self._reservations.reserve(self._blocks(offset, length)):
            await super().discard(offset, length)

    def _write(self, offset: int, view: memoryview) -> None:
        for part, piece in _pieces(offset, view):
            blocks = self._blocks(part, len(piece))
            memory = _scratch(blocks.length)
            self._read_partial_blocks(blocks, Extent(part, len(piece)), memory)
            skip = part - blocks.offset
            memory[skip : skip + len(piece)] = piece
            blocking.write(self._fd, blocks.offset, memory)
            if blocks.end > self.size_bytes and not self.is_device:
                os.ftruncate(self._fd, self.size_bytes)

    def _read_partial_blocks(self, blocks: Extent, data: Extent, memory: memoryview) -> None:
        """Read the first and the last block where ``data`` covers them only in part."""
        align = self._alignment_bytes
        if blocks.offset != data.offset:
            self._read_blocks(blocks.offset, memory[:align])
        if blocks.end != data.end:
            self._read_blocks(blocks.end - align, memory[-align:])

    def _read_blocks(self, offset: int, memory: memoryview) -> None:
        blocking.read(self._fd, offset, memory, block_bytes=self._alignment_bytes)


def _scratch(length: int) -> memoryview:
    """Memory aligned to pages. It goes with its last view; closed by hand it would be an error
    while a failed call's traceback still has one.
    """
    return memoryview(mmap.mmap(-1, length))


def _pieces(offset: int, view: memoryview) -> list[tuple[int, memoryview]]:
    step = limits.DIRECT_SCRATCH_BYTES
    return [(offset + at, view[at : at + step]) for at in range(0, len(view), step)]


def _set_direct(fd: int, filename: str) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise BlockdError(
            f"Could not open '{filename}': filesystem does not support O_DIRECT"
        ) from error


def _alignment(fd: int) -> int:
    """The smallest block, in bytes, that the descriptor reads with O_DIRECT."""
    for align in (512, 1024, 2048):
        if _reads(fd, align):
            return align
    return 4096


def _reads(fd: int, length: int) -> bool:
    try:
        os.preadv(fd, (_scratch(4096)[:length],), 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
