"""``copy-before-write`` keeps an instant of a node; ``snapshot-access`` reads it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from blockd import limits
from blockd.backup.clusters import Clusters
from blockd.backup.kept_instant import KeptInstant
from blockd.backup.plan import Performance
from blockd.bitmap import Bits, DirtyBitmap
from blockd.block import Access, Allocation, Driver, Filter, Graph, Hold, Node, Perm, Role
from blockd.errors import BlockdError


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a user wants an instant to be kept.

    ``bitmap``: only what it names is. ``breaks_writes``: where old data can't be copied, the
    write fails; else the instant is lost. ``timeout_seconds``: when copying has taken so long, it
    counts as failed; 0 for never. ``min_cluster_bytes``: as ``Performance`` has it.
    """

    bitmap: DirtyBitmap | None = None
    breaks_writes: bool = True
    timeout_seconds: int = 0
    min_cluster_bytes: int = 0

    @property
    def patience_seconds(self) -> float:
        """How long a write may wait; a view is not worth to let it wait for ever."""
        if self.timeout_seconds:
            return self.timeout_seconds
        return math.inf if self.breaks_writes else limits.GUEST_WAIT_FOR_COPY_SECONDS


class CopyBeforeWriteDriver(Filter):
    """Passes everything on; the instant is that of ``open``.

    What keeps it is a hook of the node below, so that nobody can write past it.
    """

    name = "copy-before-write"
    follows_child_size = False

    def __init__(self, child: Node, kept: KeptInstant, hold: Hold, *, read_only: bool) -> None:
        self.kept = kept
        self._hold = hold
        super().__init__(child, read_only=read_only)

    @classmethod
    async def open(
        cls,
        graph: Graph,
        user: str,
        child: Node,
        target: Node,
        keeping: Keeping,
        *,
        read_only: bool,
    ) -> CopyBeforeWriteDriver:
        """``user`` is how messages call the new node. Raises ``BlockdError``."""
        check_target(child, target)
        assert graph.tasks is not None, "the daemon gives its graph a nursery"
        async with child.quiesced():
            graph.check_no_other_writer(child)
            kept = KeptInstant(
                child,
                target,
                _clusters(child, target, keeping),
                graph.tasks,
                breaks_writes=keeping.breaks_writes,
                timeout_seconds=keeping.patience_seconds,
            )
            hold = graph.hold(child, user, Role.FILE, writes=False, alone=True)
            child.add_hook(kept)
        return cls(child, kept, hold, read_only=read_only)

    def describe(self) -> str:
        return self.child.driver.filename

    @property
    def children(self) -> Mapping[Role, Node]:
        return {Role.FILE: self.child, Role.OLD_DATA: self.kept.target}

    def child_access(self, role: Role, access: Access) -> Access:
        if role is Role.OLD_DATA:
            return Access(Perm.WRITE, Perm.WRITE)
        return super().child_access(role, access)

    def replace_child(self, role: Role, node: Node | None) -> None:
        assert node is not None
        if role is Role.OLD_DATA:
            raise BlockdError("The target of a copy-before-write filter can't be replaced")
        super().replace_child(role, node)

    async def truncate(self, size_bytes: int) -> None:
        raise BlockdError("Image format driver does not support resize")

    async def close(self) -> None:
        await self.kept.close()
        self._hold.release()


def check_target(source: Node, target: Node) -> None:
    """Raise ``BlockdError`` where ``target`` can't take what ``source`` holds."""
    storage = source.driver.identity
    if source is target or (storage is not None and storage == target.driver.identity):
        raise BlockdError("Source and target cannot be the same")
    if target.size_bytes < source.size_bytes:
        raise BlockdError(f"Target '{target.name}' is smaller than '{source.name}'")


def _clusters(source: Node, target: Node, keeping: Keeping) -> Clusters:
    performance = Performance(min_cluster_bytes=keeping.min_cluster_bytes)
    try:
        performance.check_cluster_fits()
    except BlockdError as error:
        raise BlockdError(f"Cannot create block-copy-state: {error.message}") from None
    performance.check_power_of_two()
    cluster_bytes = performance.cluster_bytes(target.driver.cluster_size_bytes)
    wanted = None if keeping.bitmap is None else _wanted(source, keeping.bitmap)
    return Clusters(source.size_bytes, cluster_bytes, wanted)


def _wanted(source: Node, bitmap: DirtyBitmap) -> Bits:
    wanted = Bits(source.size_bytes, bitmap.granularity_bytes)
    try:
        wanted.merge(bitmap.usable_bits())
    except BlockdError as error:
        raise BlockdError(
            f"Cannot create block-copy-state: Failed to merge bitmap '{bitmap.name}' "
            f"to internal copy-bitmap: {error.message}"
        ) from None
    return wanted


class SnapshotAccessDriver(Driver):
    """The instant that the filter below keeps."""

    name = "snapshot-access"

    def __init__(self, filter_node: Node, *, read_only: bool, unmap: bool) -> None:
        """``unmap``: what is discarded here is no longer kept. Raises ``BlockdError``."""
        below = filter_node.driver
        if not isinstance(below, CopyBeforeWriteDriver):
            raise BlockdError(f"Node '{filter_node.name}' is no 'copy-before-write' filter")
        self._filter_node = filter_node
        self._kept = below.kept
        self._unmap = unmap
        self.read_only = read_only
        self.size_bytes = below.size_bytes
        self.filename = below.filename

    @property
    def children(self) -> Mapping[Role, Node]:
        return {Role.FILE: self._filter_node}

    def child_access(self, role: Role, access: Access) -> Access:
        """What is written to the filter changes nothing here; but its size does."""
        return Access(shares=Perm.WRITE)

    async def read(self, offset: int, view: memoryview) -> None:
        await self._kept.read(offset, view)

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        return await self._kept.allocation(offset, length)

    async def write(self, offset: int, view: memoryview) -> None:
        raise _unwritable()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        raise _unwritable()

    async def discard(self, offset: int, length: int) -> None:
        if self._unmap:
            await self._kept.drop(offset, length)

    async def flush(self) -> None:
        """Nothing is ever written here."""
        await trio.lowlevel.checkpoint()

    async def allocated_bytes(self) -> int:
        return await self._filter_node.driver.allocated_bytes()

    async def close(self) -> None:
        """The filter is a node of its own and is closed as one."""


def _unwritable() -> OSError:
    return OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
