"""The openers of the drivers that pass on what they are asked for."""

from __future__ import annotations

import errno

from blockd.block import (
    BlkdebugDriver,
    CopyOnReadDriver,
    Driver,
    Graph,
    InjectError,
    Node,
    Role,
    SetState,
    ThrottleDriver,
)
from blockd.errors import BlockdError
from blockd.objects import ThrottleGroup
from blockd.qmp.opening import Opening
from blockd.qmp.types.blockdev import (
    BlkdebugInjectErrorOptions,
    BlkdebugOptions,
    CopyOnReadOptions,
    ThrottleOptions,
)


async def open_blkdebug(opening: Opening, options: BlkdebugOptions) -> Driver:
    child = await opening.child(Role.FILE, options.image)
    return BlkdebugDriver(
        child,
        read_only=opening.common.read_only,
        errors=[_inject_error(each) for each in options.inject_error or ()],
        transitions=[
            SetState(each.event, each.new_state, each.state or 0)
            for each in options.set_state or ()
        ],
    )


def _inject_error(options: BlkdebugInjectErrorOptions) -> InjectError:
    return InjectError(
        options.event,
        state=options.state or 0,
        io_type=options.iotype,
        errno=errno.EIO if options.errno is None else options.errno,
        # QEMU's way to say none.
        sector=None if options.sector == -1 else options.sector,
        once=bool(options.once),
        immediately=bool(options.immediately),
    )


async def open_copy_on_read(opening: Opening, options: CopyOnReadOptions) -> Driver:
    child = await opening.child(Role.FILE, options.file)
    depth_max = None if options.bottom is None else _depth(opening.graph, child, options.bottom)
    return CopyOnReadDriver(child, read_only=opening.common.read_only, depth_max=depth_max)


def _depth(graph: Graph, top: Node, name: str) -> int:
    """How far below ``top`` its backing file called ``name`` is; 1 for itself."""
    bottom = graph.find(name)
    if bottom is None:
        raise BlockdError(f"Bottom node '{name}' not found")
    depth, node = 1, top
    while node is not bottom:
        if node.backing is None:
            raise BlockdError(f"Node '{name}' is no backing file of '{top.name}'")
        depth, node = depth + 1, node.backing
    return depth


async def open_throttle(opening: Opening, options: ThrottleOptions) -> Driver:
    child = await opening.child(Role.FILE, options.file)
    group = opening.graph.objects.find(options.throttle_group, ThrottleGroup)
    if group is None:
        raise BlockdError(f"Throttle group '{options.throttle_group}' does not exist")
    read_only = opening.common.read_only
    return ThrottleDriver(child, group, options.throttle_group, read_only=read_only)
