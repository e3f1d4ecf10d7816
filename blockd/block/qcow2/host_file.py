"""The file that the image lies in: a node that grows as it is needed."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import trio

from blockd import limits
from blockd.block.node import Node
from blockd.errors import BlockdError, WouldBlock


class HostFile:
    """Reads, writes and growth of the image's file, or of its external data file.

    What is small is first tried inline, as it is mostly in the page cache.
    """

    def __init__(self, node: Node, growth_bytes: int | None = None) -> None:
        """``growth_bytes``: how much the file grows by at least, if not by what the limit says."""
        self.node = node
        self._growth_bytes = growth_bytes or limits.QCOW2_GROWTH_BYTES
        self._growth = trio.Lock()

    def debug_event(self, event: str) -> None:
        """Say how far the work on the image has come, in QEMU's words: ``BlkdebugEvent``."""
        self.node.driver.debug_event(event)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; what lies beyond the end reads as zeroes. Raises ``OSError``."""
        inside = max(0, min(len(view), self.node.size_bytes - offset))
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)
            view = view[:inside]
        if not inside:
            return
        if len(view) <= limits.QCOW2_INLINE_BYTES:
            with suppress(WouldBlock):
                self.node.read_nowait(offset, view)
                return
        await self.node.read(offset, view)

    async def read_bytes(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        await self.read(offset, memoryview(data))
        return data

    async def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, growing the file where it is too short. Raises ``OSError``."""
        await self.make_room(offset + len(view))
        if len(view) <= limits.QCOW2_INLINE_BYTES:
            with suppress(WouldBlock):
                self.node.write_nowait(offset, view)
                return
        await self.node.write(offset, view)

    async def make_room(self, end: int) -> None:
        """Let the file not end before ``end``. Raises ``OSError``."""
        if end > self.node.size_bytes:
            await self.grow(end)

    async def grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long. Raises ``OSError`` (ENOSPC if it can't)."""
        async with self._growth:
            if end <= self.node.size_bytes:
                return
            step = self._growth_bytes
            try:
                await self.node.resize(-(-end // step) * step)
            except BlockdError as error:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    async def shrink(self, end: int) -> None:
        """Give back what the file has beyond ``end``, if it is one that can."""
        if end < self.node.size_bytes:
            with suppress(BlockdError):
                await self.node.resize(end)
