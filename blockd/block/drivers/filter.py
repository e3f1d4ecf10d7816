"""What the drivers have in common that stand on one node and change no byte of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blockd.block.allocation import Allocation
from blockd.block.descriptor import Descriptor, WriteBy
from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Role


class Filter(Driver):
    """Passes everything to ``child``; a subclass says what it does on the way."""

    follows_child_size = True
    inline_offset_bytes = 0
    #: Whether the child may get compressed clusters this way.
    passes_compressed = False
    #: Whether reads and writes may go to a descriptor of the child, past this.
    passes_descriptors = True
    #: How the child is called in the driver's options.
    child_option = "file"

    def __init__(self, child: Node, *, read_only: bool) -> None:
        self.read_only = read_only
        self.child = child
        self.child_changed()

    def replace_child(self, role: Role, node: Node | None) -> None:
        assert node is not None
        self.child = node
        self.child_changed()

    def child_changed(self) -> None:
        below = self.child.driver
        self.size_bytes = self.child.size_bytes
        self.cluster_size_bytes = below.cluster_size_bytes
        self.identity = below.identity
        self.direct = below.direct
        self.flushes = below.flushes
        self.ignores_discards = below.ignores_discards
        self.compresses = self.passes_compressed and below.compresses
        self.filename = self.describe()

    def describe(self) -> str:
        """How QMP names the driver."""
        return f"json:{json.dumps(self.options)}"

    @property
    def children(self) -> Mapping[Role, Node]:
        return {Role.FILE: self.child}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.own_options(), self.child_option: self.child.driver.options}

    def own_options(self) -> dict[str, Any]:
        """The driver's options, but for the child."""
        return {"driver": self.name}

    async def truncate(self, size_bytes: int) -> None:
        await self.child.resize(size_bytes)
        self.child_changed()

    @property
    def path(self) -> str | None:
        return self.child.path

    def descriptor(self) -> Descriptor | None:
        return self.child.descriptor() if self.passes_descriptors else None

    @property
    def takes_write_by(self) -> bool:
        return self.passes_descriptors and self.child.takes_write_by

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        return await self.child.write_by(offset, length, call)

    def read_nowait(self, offset: int, view: memoryview) -> None:
        self.child.read_nowait(offset, view)

    def write_nowait(self, offset: int, view: memoryview) -> None:
        self.child.write_nowait(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        await self.child.read(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        await self.child.write(offset, view)

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        await self.child.write_compressed(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.child.write_zeroes(offset, length, unmap=unmap)

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        return self.child.zeroes_fast(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self.child.discard(offset, length)

    async def flush(self) -> None:
        await self.child.flush()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        return await self.child.allocation(offset, length)

    async def allocated_bytes(self) -> int:
        return await self.child.allocated_bytes()

    async def close(self) -> None:
        """The child is a node of its own and is closed as one."""
