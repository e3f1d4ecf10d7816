"""blockdev-add, blockdev-del and the queries about nodes."""

from __future__ import annotations

from typing import Any

from blockd.bitmap import BitmapInfo
from blockd.block import Node
from blockd.errors import BlockdError
from blockd.qmp.commands.image_info import backing_depth, describe_image
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import open_node
from blockd.qmp.services import Services
from blockd.qmp.types.block import (
    BlockdevDel,
    BlockResize,
    BlockSetWriteThreshold,
    QueryBlock,
    QueryNamedBlockNodes,
)
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
    finally:
        for each in (node, *graph.standing.below(node), *graph.standing.above(node)):
            await graph.archive.keep(each)


def block_set_write_threshold(services: Services, arguments: BlockSetWriteThreshold) -> None:
    node = services.graph.find(arguments.node_name)
    if node is None:
        raise BlockdError(f"Device '{arguments.node_name}' not found")
    threshold = arguments.write_threshold

    def tell(amount_exceeded: int) -> None:
        event = {
            "node-name": node.name,
            "amount-exceeded": amount_exceeded,
            "write-threshold": threshold,
        }
        services.bus.publish("BLOCK_WRITE_THRESHOLD", event)

    node.write_threshold.watch(threshold, tell)


def query_block(_services: Services, _arguments: QueryBlock) -> list[dict[str, Any]]:
    return []


async def query_named_block_nodes(
    services: Services, arguments: QueryNamedBlockNodes
) -> list[dict[str, Any]]:
    rows = []
    for node in services.graph:
        image = await describe_image(node, flat=arguments.flat)
        rows.append(_describe(node, image))
    return rows


def _describe(node: Node, image: dict[str, Any]) -> dict[str, Any]:
    driver = node.driver
    described: dict[str, Any] = {
        "image": image,
        "node-name": node.name,
        "file": driver.filename,
        "drv": driver.name,
        "ro": node.read_only,
        "active": True,
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": backing_depth(node),
        "write_threshold": _as_signed(node.write_threshold.offset_bytes),
        "cache": {"writeback": True, "direct": driver.direct, "no-flush": not driver.flushes},
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
    }
    if node.backing is not None:
        described["backing_file"] = node.backing.driver.filename
    bitmaps = [_describe_bitmap(info) for info in node.bitmaps.infos()]
    return described | ({"dirty-bitmaps": bitmaps} if bitmaps else {})


def _as_signed(threshold: int) -> int:
    """As QEMU shows it: an unsigned number in a signed member."""
    return threshold - (1 << 64) if threshold >> 63 else threshold


def _describe_bitmap(info: BitmapInfo) -> dict[str, Any]:
    described: dict[str, Any] = {} if info.name is None else {"name": info.name}
    if info.inconsistent:
        described["inconsistent"] = True
    if info.reason is not None:
        described["reason"] = info.reason.value
    return described | {
        "recording": info.recording,
        "persistent": info.persistent,
        "busy": info.busy,
        "granularity": info.granularity_bytes,
        "count": info.count_bytes,
    }
