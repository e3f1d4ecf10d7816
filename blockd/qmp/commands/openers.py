"""The opener of each driver."""

from __future__ import annotations

import errno

import trio

from blockd.block import (
    SECTOR_BYTES,
    BlkdebugDriver,
    CopyOnReadDriver,
    Driver,
    Graph,
    InjectError,
    Node,
    NullDriver,
    RawDriver,
    Role,
    SetState,
    ThrottleDriver,
    open_file,
)
from blockd.errors import BlockdError
from blockd.listener import InetAddress, UnixAddress
from blockd.nbd.client import NbdDriver, Target
from blockd.objects import ThrottleGroup
from blockd.qmp.opening import Openers, Opening
from blockd.qmp.types.blockdev import (
    BlkdebugInjectErrorOptions,
    BlkdebugOptions,
    CopyOnReadOptions,
    FileOptions,
    HostDeviceOptions,
    NbdOptions,
    NullOptions,
    RawOptions,
    ThrottleOptions,
    UnixServerAddress,
)


async def _open_file(opening: Opening, options: FileOptions | HostDeviceOptions) -> Driver:
    common = opening.common
    return await trio.to_thread.run_sync(
        lambda: open_file(
            options.filename,
            driver="file" if isinstance(options, FileOptions) else "host_device",
            read_only=common.read_only,
            auto_read_only=common.auto_read_only,
            direct=common.direct,
            unmap=common.unmap,
            flushes=common.flushes,
        )
    )


async def open_raw(opening: Opening, options: RawOptions) -> Driver:
    common = opening.common
    child = await opening.child(Role.FILE, options.file)
    for name, value in (("offset", options.offset), ("size", options.size)):
        if value is not None and value < 0:
            raise BlockdError(f"Value '{value}' is out of range for parameter '{name}'")
    if options.size is not None and options.size % SECTOR_BYTES:
        raise BlockdError("Specified size is not multiple of 512")
    return RawDriver(
        child,
        read_only=common.read_only or (common.auto_read_only and child.read_only),
        offset_bytes=options.offset or 0,
        size_bytes=options.size,
        direct=common.direct,
        flushes=common.flushes,
        unmap=common.unmap,
    )


async def _open_null(opening: Opening, options: NullOptions) -> Driver:
    if options.size is not None and options.size < 0:
        raise BlockdError(f"Value '{options.size}' is out of range for parameter 'size'")
    return NullDriver(
        options.size,
        latency_ns=options.latency_ns,
        read_zeroes=options.read_zeroes,
        read_only=opening.common.read_only,
    )


async def _open_blkdebug(opening: Opening, options: BlkdebugOptions) -> Driver:
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


async def _open_copy_on_read(opening: Opening, options: CopyOnReadOptions) -> Driver:
    child = await opening.child(Role.FILE, options.file)
    depth_max = None if options.bottom is None else _depth(opening.graph, child, options.bottom)
    return CopyOnReadDriver(child, read_only=opening.common.read_only, depth_max=depth_max)


async def _open_throttle(opening: Opening, options: ThrottleOptions) -> Driver:
    child = await opening.child(Role.FILE, options.file)
    group = opening.graph.objects.find(options.throttle_group, ThrottleGroup)
    if group is None:
        raise BlockdError(f"Throttle group '{options.throttle_group}' does not exist")
    read_only = opening.common.read_only
    return ThrottleDriver(child, group, options.throttle_group, read_only=read_only)


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


async def _open_nbd(opening: Opening, options: NbdOptions) -> Driver:
    tasks = opening.graph.tasks
    assert tasks is not None, "the daemon gives its graph a nursery"
    server = options.server
    address = (
        UnixAddress(server.path)
        if isinstance(server, UnixServerAddress)
        else InetAddress(server.host, server.port, server.ipv4, server.ipv6)
    )
    return await NbdDriver.open(
        Target(address, options.export),
        tasks,
        read_only=opening.common.read_only,
        auto_read_only=opening.common.auto_read_only,
        open_timeout_seconds=options.open_timeout,
        reconnect_delay_seconds=options.reconnect_delay,
    )


OPENERS: Openers = {
    NbdOptions: _open_nbd,
    ThrottleOptions: _open_throttle,
    NullOptions: _open_null,
    BlkdebugOptions: _open_blkdebug,
    CopyOnReadOptions: _open_copy_on_read,
    FileOptions: _open_file,
    HostDeviceOptions: _open_file,
    RawOptions: open_raw,
}
