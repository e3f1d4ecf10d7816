"""blockdev-add, blockdev-del and the queries about nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from blockd.bitmap import BitmapInfo
from blockd.block import SECTOR_BYTES, Driver, Graph, Node, RawDriver, Role, open_file
from blockd.errors import BlockdError
from blockd.qmp.services import Services
from blockd.qmp.types.block import (
    BlockdevDel,
    BlockdevOptions,
    BlockResize,
    FileOptions,
    HostDeviceOptions,
    NodeOptions,
    QueryBlock,
    QueryNamedBlockNodes,
    RawOptions,
)


@dataclass(frozen=True, slots=True)
class _Inherited:
    """What a node that is made for its parent takes from it where it says nothing itself."""

    read_only: bool
    direct: bool
    flushes: bool
    unmap: bool


#: A node of its own keeps discarded blocks; below another one the upper one decides.
_ROOT = _Inherited(read_only=False, direct=False, flushes=True, unmap=False)


async def blockdev_add(services: Services, arguments: BlockdevOptions) -> None:
    if arguments.node_name is None:
        raise BlockdError("'node-name' must be specified for the root node")
    await _add(services.graph, arguments, _ROOT, owned=True)


async def _add(
    graph: Graph, options: BlockdevOptions, inherited: _Inherited, *, owned: bool
) -> Node:
    if options.node_name is not None:
        graph.check_name(options.node_name)
    settled = _settle(options, inherited)
    if isinstance(options, RawOptions):
        return await _add_raw(graph, options, settled, owned=owned)
    driver = await _open(options, settled)
    return await _put(graph, options, driver, owned=owned)


def _settle(options: NodeOptions, inherited: _Inherited) -> _Inherited:
    """The node's own options over those it inherits."""
    cache = options.cache
    direct = None if cache is None else cache.direct
    no_flush = None if cache is None else cache.no_flush
    return _Inherited(
        read_only=inherited.read_only if options.read_only is None else options.read_only,
        direct=inherited.direct if direct is None else direct,
        flushes=inherited.flushes if no_flush is None else not no_flush,
        unmap=inherited.unmap if options.discard is None else options.discard == "unmap",
    )


async def _open(options: FileOptions | HostDeviceOptions, settled: _Inherited) -> Driver:
    return await trio.to_thread.run_sync(
        lambda: open_file(
            options.filename,
            driver="file" if isinstance(options, FileOptions) else "host_device",
            read_only=settled.read_only,
            auto_read_only=options.auto_read_only,
            direct=settled.direct,
            unmap=settled.unmap,
            flushes=settled.flushes,
        )
    )


async def _put(graph: Graph, options: NodeOptions, driver: Driver, *, owned: bool) -> Node:
    try:
        return graph.add(options.node_name, driver, owned=owned)
    except BlockdError:
        # Two nodes of one command wanted the same name.
        with trio.CancelScope(shield=True):
            await driver.close()
        raise


async def _add_raw(graph: Graph, options: RawOptions, settled: _Inherited, *, owned: bool) -> Node:
    if isinstance(options.file, str):
        child = graph.get(options.file, device=options.file)
    else:
        # Below a node of its own a file follows the discards that reach it.
        below = _Inherited(settled.read_only, settled.direct, settled.flushes, unmap=True)
        child = await _add(graph, options.file, below, owned=False)
    try:
        return _stack(graph, options, settled, child, owned=owned)
    except BlockdError:
        if not isinstance(options.file, str):
            with trio.CancelScope(shield=True):
                await graph.remove(child)
        raise


def _stack(
    graph: Graph, options: RawOptions, settled: _Inherited, child: Node, *, owned: bool
) -> Node:
    for name, value in (("offset", options.offset), ("size", options.size)):
        if value is not None and value < 0:
            raise BlockdError(f"Value '{value}' is out of range for parameter '{name}'")
    if options.size is not None and options.size % SECTOR_BYTES:
        raise BlockdError("Specified size is not multiple of 512")
    driver = RawDriver(
        child,
        read_only=settled.read_only or (options.auto_read_only and child.read_only),
        offset_bytes=options.offset or 0,
        size_bytes=options.size,
        direct=settled.direct,
        flushes=settled.flushes,
        unmap=settled.unmap,
    )
    node = graph.add(options.node_name, driver, owned=owned)
    claim = child.users.claim(
        f"node '{node.name}'", Role.FILE, writes=False, shares_resize=not driver.windowed
    )
    graph.put_on(node, child, claim)
    return node


async def blockdev_del(services: Services, arguments: BlockdevDel) -> None:
    await services.graph.remove(services.graph.find_owned(arguments.node_name))


async def block_resize(services: Services, arguments: BlockResize) -> None:
    graph = services.graph
    node = graph.get(arguments.node_name or "", device=arguments.device or "")
    if arguments.size < 0:
        raise BlockdError("Parameter 'size' expects a >0 size")
    try:
        await graph.resize(node, arguments.size)
    except OSError as error:
        raise BlockdError(f"Could not resize file: {error.strerror}") from error


def query_block(_services: Services, _arguments: QueryBlock) -> list[dict[str, Any]]:
    return []


async def query_named_block_nodes(
    services: Services, _arguments: QueryNamedBlockNodes
) -> list[dict[str, Any]]:
    rows = []
    for node in services.graph:
        try:
            allocated_bytes = await node.driver.allocated_bytes()
        except OSError:
            # Deleted meanwhile, or its storage is gone; the rest is known all the same.
            allocated_bytes = None
        rows.append(_describe(node, allocated_bytes))
    return rows


def _describe(node: Node, allocated_bytes: int | None) -> dict[str, Any]:
    driver = node.driver
    image: dict[str, Any] = {
        "virtual-size": node.size_bytes,
        "filename": driver.filename,
        "format": driver.name,
        "dirty-flag": False,
    }
    if allocated_bytes is not None:
        image["actual-size"] = allocated_bytes
    if driver.name == "file":
        image["format-specific"] = {"type": "file", "data": {}}
    described: dict[str, Any] = {
        "image": image,
        "node-name": node.name,
        "file": driver.filename,
        "drv": driver.name,
        "ro": node.read_only,
        "active": True,
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": 0,
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": driver.direct, "no-flush": not driver.flushes},
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
    }
    bitmaps = [_describe_bitmap(info) for info in node.bitmaps.infos()]
    return described | ({"dirty-bitmaps": bitmaps} if bitmaps else {})


def _describe_bitmap(info: BitmapInfo) -> dict[str, Any]:
    described: dict[str, Any] = {} if info.name is None else {"name": info.name}
    return described | {
        "recording": info.recording,
        "persistent": info.persistent,
        "busy": info.busy,
        "granularity": info.granularity_bytes,
        "count": info.count_bytes,
    }
