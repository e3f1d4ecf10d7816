"""blockdev-snapshot."""

from __future__ import annotations

from collections.abc import Callable

from blockd.block import Graph, Node, Role
from blockd.errors import BlockdError
from blockd.qmp.services import Services
from blockd.qmp.types.snapshot import BlockdevSnapshot


async def blockdev_snapshot(services: Services, arguments: BlockdevSnapshot) -> None:
    graph = services.graph
    node = _find_node(graph, arguments)
    await _flush(node)
    async with graph.quiesced([node]):
        put_overlay(graph, arguments)
    await graph.retire(node)


def put_overlay(graph: Graph, arguments: BlockdevSnapshot) -> Callable[[], None]:
    """Do it, while the node is quiesced. Returns what undoes it at the same instant.

    Raises ``BlockdError``, and then nothing has changed.
    """
    node = _find_node(graph, arguments)
    overlay = graph.get(arguments.overlay, device=arguments.overlay)
    check_overlay(overlay)
    return graph.put_over(overlay, node)


def _find_node(graph: Graph, arguments: BlockdevSnapshot) -> Node:
    node = graph.get(arguments.node, device=arguments.node)
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


def check_overlay(overlay: Node) -> None:
    """Raise ``BlockdError`` unless it can be put on a node; QEMU's order."""
    if overlay.users.of(Role.ROOT):
        raise BlockdError("The overlay is already in use")
    overlay.users.check_not_busy(Role.TARGET)
    if overlay.backing is not None:
        raise BlockdError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise BlockdError("The overlay does not support backing images")
