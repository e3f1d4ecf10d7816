"""``throttle``: the node below, no faster than its throttle group allows."""

from __future__ import annotations

from typing import Any

from blockd.block.descriptor import Descriptor
from blockd.block.drivers.filter import Filter
from blockd.block.node import Node
from blockd.errors import WouldBlock
from blockd.objects import ThrottleGroup


class ThrottleDriver(Filter):
    """Each read, write, zeroing and discard is one operation of the group; flushes are free."""

    name = "throttle"

    def __init__(
        self, child: Node, group: ThrottleGroup, group_id: str, *, read_only: bool = False
    ) -> None:
        self._group_id = group_id
        super().__init__(child, read_only=read_only)
        self._group = group
        self._pace = group.pace
        group.users += 1

    def own_options(self) -> dict[str, Any]:
        return {"throttle-group": self._group_id, **super().own_options()}

    def descriptor(self, *, write: bool) -> Descriptor | None:
        return None

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
        await self._pace.account(self, writes=False, length=len(view))
        await super().read(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        await self._pace.account(self, writes=True, length=len(view))
        await super().write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._pace.account(self, writes=True, length=length)
        await super().write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self._pace.account(self, writes=True, length=length)
        await super().discard(offset, length)

    async def close(self) -> None:
        self._group.users -= 1
