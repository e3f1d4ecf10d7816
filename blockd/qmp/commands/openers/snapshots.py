"""The openers of what keeps an instant, and of what reads it."""

from __future__ import annotations

from blockd.backup import CopyBeforeWriteDriver, Keeping, SnapshotAccessDriver
from blockd.bitmap import DirtyBitmap
from blockd.block import Driver, Graph, Role
from blockd.errors import BlockdError
from blockd.qmp.opening import Opening
from blockd.qmp.types.bitmap import BitmapOfNode
from blockd.qmp.types.blockdev import CopyBeforeWriteOptions, SnapshotAccessOptions


async def open_copy_before_write(opening: Opening, options: CopyBeforeWriteOptions) -> Driver:
    source = await opening.child(Role.FILE, options.file)
    target = await opening.child(Role.OLD_DATA, options.target)
    return await CopyBeforeWriteDriver.open(
        opening.graph,
        "a filter" if options.node_name is None else f"node '{options.node_name}'",
        source,
        target,
        Keeping(
            None if options.bitmap is None else _bitmap(opening.graph, options.bitmap),
            breaks_writes=options.on_cbw_error == "break-guest-write",
            timeout_seconds=options.cbw_timeout,
            min_cluster_bytes=options.min_cluster_size,
        ),
        read_only=opening.common.read_only,
    )


def _bitmap(graph: Graph, named: BitmapOfNode) -> DirtyBitmap:
    node = graph.find(named.node)
    if node is None:
        raise BlockdError(f"Node '{named.node}' not found")
    return node.bitmaps.get(named.name)


async def open_snapshot_access(opening: Opening, options: SnapshotAccessOptions) -> Driver:
    child = await opening.child(Role.FILE, options.file)
    common = opening.common
    return SnapshotAccessDriver(child, read_only=common.read_only, unmap=common.unmap)
