"""``raw``: the bytes of the node below, or a window of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blockd.block.allocation import Allocation
from blockd.block.descriptor import Descriptor, WriteBy, moved
from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Role
from blockd.errors import BlockdError


class RawDriver(Driver):
    """Passes everything to ``child``, ``offset_bytes`` further on."""

    name = "raw"

    def __init__(
        self,
        child: Node,
        *,
        read_only: bool = False,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        direct: bool = False,
        flushes: bool = True,
        unmap: bool = True,
    ) -> None:
        """``size_bytes`` None: up to the child's end. Raises ``BlockdError`` for a bad window."""
        self.read_only = read_only
        self.offset_bytes = self.inline_offset_bytes = offset_bytes
        self._fixed_size_bytes = size_bytes
        # One that is made to be a part of the child relies on where that part is.
        self.follows_child_size = not offset_bytes and size_bytes is None
        self.direct = direct
        self.flushes = flushes
        self.ignores_discards = not unmap
        self._stand_on(child)

    def _stand_on(self, child: Node) -> None:
        """Raise ``BlockdError`` where the window does not fit."""
        room_bytes = child.size_bytes - self.offset_bytes
        if room_bytes < 0:
            raise BlockdError(
                f"Offset ({self.offset_bytes}) cannot be greater than "
                f"size of the containing file ({child.size_bytes})"
            )
        if self._fixed_size_bytes is not None and self._fixed_size_bytes > room_bytes:
            raise BlockdError(
                f"The sum of offset ({self.offset_bytes}) and size ({self._fixed_size_bytes}) has "
                "to be smaller or equal to the  actual size of the containing file "
                f"({child.size_bytes})"
            )
        self.child = child
        self.child_changed()

    def replace_child(self, role: Role, node: Node | None) -> None:
        assert role is Role.FILE
        assert node is not None
        self._stand_on(node)

    @property
    def options(self) -> dict[str, Any]:
        # In QEMU's order.
        options: dict[str, Any] = {"offset": self.offset_bytes} if self.offset_bytes else {}
        options["driver"] = self.name
        if self._fixed_size_bytes is not None:
            options["size"] = self._fixed_size_bytes
        return options | {"file": self.child.driver.options}

    @property
    def children(self) -> Mapping[Role, Node]:
        return {Role.FILE: self.child}

    def child_changed(self) -> None:
        below = self.child.driver
        fixed_bytes = self._fixed_size_bytes
        room_bytes = self.child.size_bytes - self.offset_bytes
        self.size_bytes = room_bytes if fixed_bytes is None else fixed_bytes
        #: A window's writes are not all that changes the file, nor is all of it the window's.
        self._whole = not self.offset_bytes and self.size_bytes == self.child.size_bytes
        self.identity = below.identity if self._whole else None
        self.cluster_size_bytes = below.cluster_size_bytes
        plain = "filename" in below.options and self.follows_child_size
        self.filename = below.filename if plain else f"json:{json.dumps(self.options)}"

    async def truncate(self, size_bytes: int) -> None:
        if self._fixed_size_bytes is not None:
            raise BlockdError("Cannot resize fixed-size raw disks")
        await self.child.resize(self.offset_bytes + size_bytes)
        self.child_changed()

    @property
    def path(self) -> str | None:
        return self.child.path if self._whole else None

    def descriptor(self) -> Descriptor | None:
        below = self.child.descriptor()
        return None if below is None else below.moved(self.offset_bytes)

    @property
    def takes_write_by(self) -> bool:
        return self.child.takes_write_by

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        by = self.offset_bytes
        written = await self.child.write_by(offset + by, length, moved(call, by))
        return written - by

    def read_nowait(self, offset: int, view: memoryview) -> None:
        self.child.read_nowait(offset + self.offset_bytes, view)

    def write_nowait(self, offset: int, view: memoryview) -> None:
        self.child.write_nowait(offset + self.offset_bytes, view)

    async def read(self, offset: int, view: memoryview) -> None:
        await self.child.read(offset + self.offset_bytes, view)

    async def write(self, offset: int, view: memoryview) -> None:
        await self.child.write(offset + self.offset_bytes, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        unmap = unmap and not self.ignores_discards
        await self.child.write_zeroes(offset + self.offset_bytes, length, unmap=unmap)

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        return self.child.zeroes_fast(
            offset + self.offset_bytes, length, unmap=unmap and not self.ignores_discards
        )

    async def discard(self, offset: int, length: int) -> None:
        if not self.ignores_discards:
            await self.child.discard(offset + self.offset_bytes, length)

    async def flush(self) -> None:
        await self.child.flush()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        runs = await self.child.allocation(offset + self.offset_bytes, length)
        return [run.moved(-self.offset_bytes) for run in runs]

    async def allocated_bytes(self) -> int:
        return await self.child.allocated_bytes()

    async def close(self) -> None:
        """The child is a node of its own and is closed as one."""
