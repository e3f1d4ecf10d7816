"""block-dirty-bitmap-*: each is one step, so a guest write comes before or after all of it.

Where a bitmap begins to record, or forgets, the node is quiesced: a write in flight has left its
mark before, and its data may arrive afterwards.
"""

from __future__ import annotations

import trio

from blockd.bitmap import Bits, DirtyBitmap, check_granularity, default_granularity_bytes
from blockd.block import Node
from blockd.errors import BlockdError
from blockd.qmp.services import Services
from blockd.qmp.types.bitmap import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapClear,
    BlockDirtyBitmapDisable,
    BlockDirtyBitmapEnable,
    BlockDirtyBitmapMerge,
    BlockDirtyBitmapRemove,
    XDebugBlockDirtyBitmapSha256,
)


async def add(services: Services, arguments: BlockDirtyBitmapAdd) -> None:
    if not arguments.name:
        raise BlockdError("Bitmap name cannot be empty")
    node = services.graph.get(arguments.node, device=arguments.node)
    granularity_bytes = arguments.granularity
    if granularity_bytes is None:
        granularity_bytes = default_granularity_bytes(node.driver.cluster_size_bytes)
    check_granularity(granularity_bytes)
    if arguments.persistent:
        raise BlockdError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
    async with node.quiesced():
        node.bitmaps.add(arguments.name, granularity_bytes, disabled=arguments.disabled)


def remove(services: Services, arguments: BlockDirtyBitmapRemove) -> None:
    _node(services, arguments.node).bitmaps.remove(arguments.name)


async def clear(services: Services, arguments: BlockDirtyBitmapClear) -> None:
    node = _node(services, arguments.node)
    async with node.quiesced():
        node.bitmaps.get(arguments.name).clear()


async def enable(services: Services, arguments: BlockDirtyBitmapEnable) -> None:
    node = _node(services, arguments.node)
    async with node.quiesced():
        node.bitmaps.get(arguments.name).enable()


def disable(services: Services, arguments: BlockDirtyBitmapDisable) -> None:
    _bitmap(services, arguments.node, arguments.name).disable()


def merge(services: Services, arguments: BlockDirtyBitmapMerge) -> None:
    target = _bitmap(services, arguments.node, arguments.target)
    sources: list[Bits] = []
    for source in arguments.bitmaps:
        if isinstance(source, str):
            bitmap = _bitmap(services, arguments.node, source)
        else:
            bitmap = _bitmap(services, source.node, source.name)
        sources.append(bitmap.usable_bits())
    target.merge_from(sources)


async def sha256(services: Services, arguments: XDebugBlockDirtyBitmapSha256) -> dict[str, str]:
    # One thread at a time: each takes the interpreter from guests for some milliseconds at a go.
    async with services.digests:
        bits = _bitmap(services, arguments.node, arguments.name).copy_bits()
        digest = await trio.to_thread.run_sync(bits.digest, abandon_on_cancel=True)
    return {"sha256": digest}


def _node(services: Services, name: str) -> Node:
    """QEMU has another sentence here than for the other commands."""
    node = services.graph.find(name)
    if node is None:
        raise BlockdError(f"Node '{name}' not found")
    return node


def _bitmap(services: Services, node: str, name: str) -> DirtyBitmap:
    return _node(services, node).bitmaps.get(name)
