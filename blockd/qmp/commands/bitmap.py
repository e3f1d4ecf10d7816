"""block-dirty-bitmap-*: each is one step, so a guest write comes before or after all of it.

Where a bitmap begins to record, or forgets, the node is quiesced: a write in flight has left its
mark before, and its data may arrive afterwards.
"""

from __future__ import annotations

import trio

from blockd.bitmap import Bits, DirtyBitmap, default_granularity_bytes
from blockd.block import Coming, Node
from blockd.errors import BlockdError
from blockd.qmp.commands.action import Change
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
    coming, can_keep = await expect(services, arguments)
    try:
        if not can_keep:
            raise cannot_keep(arguments)
        async with _node_to_add_to(services, arguments).quiesced():
            do_add(services, arguments)
    finally:
        if coming is not None:
            coming.over = True
    await _keep(services, arguments.node)


async def remove(services: Services, arguments: BlockDirtyBitmapRemove) -> None:
    await _node(services, arguments.node).keeper.remove(arguments.name)
    await _keep(services, arguments.node)


async def clear(services: Services, arguments: BlockDirtyBitmapClear) -> None:
    async with _node(services, arguments.node).quiesced():
        do_clear(services, arguments).commit()
    await _keep(services, arguments.node)


async def enable(services: Services, arguments: BlockDirtyBitmapEnable) -> None:
    async with _node(services, arguments.node).quiesced():
        do_enable(services, arguments).commit()
    await _keep(services, arguments.node)


async def disable(services: Services, arguments: BlockDirtyBitmapDisable) -> None:
    do_disable(services, arguments).commit()
    await _keep(services, arguments.node)


async def merge(services: Services, arguments: BlockDirtyBitmapMerge) -> None:
    do_merge(services, arguments).commit()
    await _keep(services, arguments.node)


async def _keep(services: Services, name: str) -> None:
    """A kill after the reply finds the bitmaps as they are now, unless the archive told why not."""
    node = services.graph.find(name)
    if node is not None:
        await services.graph.archive.keep(node)


def cannot_keep(arguments: BlockDirtyBitmapAdd) -> BlockdError:
    """What is wrong where the archive can't."""
    return BlockdError(
        f"Bitmap '{arguments.name}' can't be kept: the state directory can't be written to"
    )


async def expect(services: Services, arguments: BlockDirtyBitmapAdd) -> tuple[Coming | None, bool]:
    """Prepare the archive for ``do_add``; the latter is refused anyway where nothing is coming.

    Else whether the archive can keep it.
    """
    if not arguments.persistent:
        return None, True
    try:
        node = _node_to_add_to(services, arguments)
        granularity_bytes = _check_new(services, node, arguments)
    except BlockdError:
        return None, True
    coming = Coming(arguments.name, granularity_bytes)
    return coming, await services.graph.archive.expect(node, coming)


def do_add(services: Services, arguments: BlockDirtyBitmapAdd) -> Change:
    node = _node_to_add_to(services, arguments)
    granularity_bytes = _check_new(services, node, arguments)
    bitmap = node.bitmaps.add(arguments.name, granularity_bytes, disabled=arguments.disabled)
    bitmap.persistent = arguments.persistent
    return Change(undo=lambda: node.bitmaps.remove(arguments.name))


def _check_new(services: Services, node: Node, arguments: BlockDirtyBitmapAdd) -> int:
    """The granularity in bytes of a bitmap that may be added."""
    granularity_bytes = arguments.granularity
    if granularity_bytes is None:
        granularity_bytes = default_granularity_bytes(node.driver.cluster_size_bytes)
    node.bitmaps.check_form(arguments.name, granularity_bytes)
    if arguments.persistent:
        _check_persistent(services, node, arguments.name, granularity_bytes)
    node.bitmaps.check_new(arguments.name, granularity_bytes)
    return granularity_bytes


def _check_persistent(services: Services, node: Node, name: str, granularity_bytes: int) -> None:
    store, archive = node.keeper.store, services.graph.archive
    if store is None or (archive.keeps_any and not store.keeps_any):
        archive.check_persistent(node)
    else:
        # An image looks at the names that there are first, in QEMU.
        node.bitmaps.check_new(name, granularity_bytes)
        node.keeper.check_new(name, granularity_bytes)


def do_remove(services: Services, arguments: BlockDirtyBitmapRemove) -> Change:
    """Until the commit the bitmap is there and in use, as in QEMU.

    Where it is kept, it is to be forgotten after the commit.
    """
    node = _node(services, arguments.node)
    release = node.bitmaps.get(arguments.name).pin_to_remove()

    def commit() -> None:
        release()
        node.bitmaps.remove(arguments.name)

    return Change(undo=release, commit=commit)


def do_clear(services: Services, arguments: BlockDirtyBitmapClear) -> Change:
    bitmap = find_bitmap(services, arguments.node, arguments.name)
    reason, before = bitmap.reason, bitmap.clear()

    def undo() -> None:
        bitmap.put_back(before)
        bitmap.reason = reason

    return Change(undo)


def do_enable(services: Services, arguments: BlockDirtyBitmapEnable) -> Change:
    bitmap = find_bitmap(services, arguments.node, arguments.name)
    undo = bitmap.enable if bitmap.recording else bitmap.disable
    bitmap.enable()
    return Change(undo)


def do_disable(services: Services, arguments: BlockDirtyBitmapDisable) -> Change:
    bitmap = find_bitmap(services, arguments.node, arguments.name)
    undo = bitmap.enable if bitmap.recording else bitmap.disable
    bitmap.disable()
    return Change(undo)


def do_merge(services: Services, arguments: BlockDirtyBitmapMerge) -> Change:
    target = find_bitmap(services, arguments.node, arguments.target)
    sources: list[Bits] = []
    for source in arguments.bitmaps:
        if isinstance(source, str):
            bitmap = find_bitmap(services, arguments.node, source)
        else:
            bitmap = find_bitmap(services, source.node, source.name)
        sources.append(bitmap.usable_bits())
    before = target.merge_from(sources)
    return Change(undo=lambda: target.put_back(before))


async def sha256(services: Services, arguments: XDebugBlockDirtyBitmapSha256) -> dict[str, str]:
    # One thread at a time: each takes the interpreter from guests for some milliseconds at a go.
    async with services.digests:
        bits = find_bitmap(services, arguments.node, arguments.name).copy_bits()
        digest = await trio.to_thread.run_sync(bits.digest, abandon_on_cancel=True)
    return {"sha256": digest}


def _node_to_add_to(services: Services, arguments: BlockDirtyBitmapAdd) -> Node:
    if not arguments.name:
        raise BlockdError("Bitmap name cannot be empty")
    return services.graph.get(arguments.node, device=arguments.node)


def _node(services: Services, name: str) -> Node:
    """QEMU has another sentence here than for the other commands."""
    node = services.graph.find(name)
    if node is None:
        raise BlockdError(f"Node '{name}' not found")
    return node


def find_bitmap(services: Services, node: str, name: str) -> DirtyBitmap:
    """The bitmap ``name`` of the node called ``node``. Raises ``BlockdError``."""
    return _node(services, node).bitmaps.get(name)
