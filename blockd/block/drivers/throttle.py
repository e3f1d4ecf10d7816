"""``throttle``: the node below, no faster than its throttle group allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from blockd.block.drivers.filter import Filter
from blockd.block.node import Node
from blockd.errors import WouldBlock
from blockd.objects import ThrottleGroup


class ThrottleDriver(Filter):
    """Each read, write, zeroing and discard is one operation of the group; flushes are free.

    While it is ``hurried`` they pass at once, and count: whoever stops a node's requests for an
    instant would else wait as long as its limits say, and other commands with him.
    """

    name = "throttle"
    passes_compressed = True
    passes_descriptors = False

    def __init__(
        self, child: Node, group: ThrottleGroup, group_id: str, *, read_only: bool = False
    ) -> None:
        self._group_id = group_id
        super().__init__(child, read_only=read_only)
        self._group = group
        self._pace = group.pace
        self._hurries = 0
        self._waiting: set[trio.CancelScope] = set()
        group.users += 1

    def own_options(self) -> dict[str, Any]:
        return {"throttle-group": self._group_id, **super().own_options()}

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if not self._pace.has_room(writes=False):
            raise WouldBlock
        self.child.read_nowait(offset, view)
        self._pace.count(writes=False, length=len(view))

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if not self._pace.has_room(writes=True):
            raise WouldBlock
        self.child.write_nowait(offset, view)
        self._pace.count(writes=True, length=len(view))

    async def read(self, offset: int, view: memoryview) -> None:
        await self._account(writes=False, length=len(view))
        await super().read(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        await self._account(writes=True, length=len(view))
        await super().write(offset, view)

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        await self._account(writes=True, length=len(view))
        await super().write_compressed(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._account(writes=True, length=length)
        await super().write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self._account(writes=True, length=length)
        await super().discard(offset, length)

    async def _account(self, *, writes: bool, length: int) -> None:
        with trio.CancelScope() as waiting:
            if self._hurries:
                waiting.cancel()
            self._waiting.add(waiting)
            try:
                await self._pace.account(self, writes=writes, length=length)
            finally:
                self._waiting.discard(waiting)
        if waiting.cancelled_caught:
            self._pace.count(writes=writes, length=length)

    @contextmanager
    def hurried(self) -> Iterator[None]:
        self._hurries += 1
        try:
            for waiting in self._waiting:
                waiting.cancel()
            with super().hurried():
                yield
        finally:
            self._hurries -= 1

    async def close(self) -> None:
        self._group.users -= 1
