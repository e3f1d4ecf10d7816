"""blockdev-add, blockdev-del and the queries about nodes."""

from __future__ import annotations

from typing import Any

from blockd.bitmap import BitmapInfo
from blockd.block import Node
from blockd.errors import BlockdError
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import open_node
from blockd.qmp.services import Services
from blockd.qmp.types.block import BlockdevDel, BlockResize, QueryBlock, QueryNamedBlockNodes
from blockd.qmp.types.blockdev import BlockdevOptions


async def blockdev_add(services: Services, arguments: BlockdevOptions) -> None:
    if arguments.node_name is None:
        raise BlockdError("'node-name' must be specified for the root node")
    await open_node(OPENERS, services.graph, arguments, owned=True)


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
