"""blockdev-snapshot and blockdev-snapshot-sync."""

from __future__ import annotations

from collections.abc import Callable

import trio

from blockd.block import Graph, Node, Role
from blockd.errors import BlockdError
from blockd.qmp.commands.overlay_file import open_overlay
from blockd.qmp.services import Services
from blockd.qmp.types.snapshot import BlockdevSnapshot, BlockdevSnapshotSync


async def blockdev_snapshot(services: Services, arguments: BlockdevSnapshot) -> None:
    graph = services.graph
    node = _find_node(graph, arguments.node, device=arguments.node)
    await _flush(node)
    async with graph.quiesced([node]):
        overlay = graph.get(arguments.overlay, device=arguments.overlay)
        _put_over(graph, overlay, node)
    await graph.retire(node)


async def blockdev_snapshot_sync(services: Services, arguments: BlockdevSnapshotSync) -> None:
    graph = services.graph
    node = _find_node(graph, arguments.node_name or "", device=arguments.device or "")
    await _flush(node)
    _check_overlay_name(graph, arguments)
    made = await open_overlay(graph, arguments, node)
    try:
        async with graph.quiesced([node]):
            _put_over(graph, made.node, node)
            graph.show(made.node)
    except BaseException:
        with trio.CancelScope(shield=True):
            await made.remove()
        raise
    await made.keep()
    await graph.retire(node)
    if not made.node.users:
        # It was made for those who follow, and nobody does.
        await graph.remove(made.node)


def _find_node(graph: Graph, name: str, *, device: str) -> Node:
    node = graph.get(name, device=device)
    node.users.check_not_busy(Role.TARGET, Role.BACKING)
    return node


async def _flush(node: Node) -> None:
    """So that little is left to be made durable when guests wait."""
    if node.read_only:
        return
    try:
        await node.flush()
    except OSError:
        raise BlockdError("IO error has occurred") from None


def _check_overlay_name(graph: Graph, arguments: BlockdevSnapshotSync) -> None:
    name = arguments.snapshot_node_name
    if arguments.node_name is not None and name is None:
        raise BlockdError("New overlay node-name missing")
    if any(node.name == name for node in graph):
        raise BlockdError("New overlay node-name already in use")


def _put_over(graph: Graph, overlay: Node, node: Node) -> Callable[[], None]:
    """Do it, while ``node`` is quiesced. Returns what undoes it at the same instant.

    Raises ``BlockdError``, in QEMU's order, and then nothing has changed.
    """
    if overlay.users.of(Role.ROOT):
        raise BlockdError("The overlay is already in use")
    overlay.users.check_not_busy(Role.TARGET)
    if overlay.backing is not None:
        raise BlockdError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise BlockdError("The overlay does not support backing images")
    return graph.put_over(overlay, node)
