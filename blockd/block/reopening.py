"""Other drivers for nodes that stay: all of them at one instant, or none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from blockd.block.archive import Archive
from blockd.block.driver import Driver
from blockd.block.graph import Graph
from blockd.block.node import Node
from blockd.block.permissions import Role
from blockd.block.settling import from_the_top
from blockd.errors import BlockdError


class Reopening:
    """The drivers that some nodes are to get. What is planned ends with ``commit`` or ``abandon``.

    Their bitmaps, users and figures stay the nodes'.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._planned: dict[Node, Driver] = {}

    def check_free(self, node: Node) -> None:
        """Raise ``BlockdError`` where a job uses the node: it holds on to the driver."""
        for each in (node, *self._graph.standing.above(node)):
            each.users.check_not_busy(Role.TARGET, Role.SOURCE)

    def check_no_cycle(self, node: Node, role: Role, child: Node) -> None:
        """Raise ``BlockdError`` where ``child`` stands on ``node``, or will once this is done."""
        if child is node or any(each is node for each in self._below(child)):
            raise BlockdError(
                f"Making '{child.name}' a {role.value} child of '{node.name}' would create a cycle"
            )

    def _below(self, node: Node) -> list[Node]:
        children = list(self.children(node).values())
        return children + [lower for child in children for lower in self._below(child)]

    def children(self, node: Node) -> Mapping[Role, Node]:
        """What ``node`` stands on, or will."""
        return self.driver(node).children

    def driver(self, node: Node) -> Driver:
        """The driver that ``node`` has, or will have."""
        return self._planned.get(node, node.driver)

    async def plan(self, node: Node, driver: Driver) -> None:
        """Give ``node`` this driver in the end, and no other that was planned for it before."""
        before = self._planned.pop(node, None)
        self._planned[node] = driver
        if before is not None:
            await before.close()

    async def abandon(self) -> None:
        """Close what was planned."""
        while self._planned:
            _, driver = self._planned.popitem()
            await driver.close()

    async def commit(self) -> None:
        """Let the nodes have their drivers, once no request is under way in them.

        Raises ``BlockdError`` where their users stand in the way, and ``OSError`` where one can't
        be flushed; all is as it was then, and what was planned is still to be abandoned. Where
        the storage of one is not fit for being written to, that node stays read-only.
        """
        self._check_sizes()
        for node in self._planned:
            if not node.read_only:
                await node.flush()
        ended = AsyncExitStack()
        try:
            async with self._suspended():
                old = [node.driver for node in self._planned]
                before = self._graph.places.change_drivers(self._planned)
                self._planned = {}
                ended.push_async_callback(self._graph.remove_unneeded, before)
                for driver in old:
                    ended.push_async_callback(driver.close)
        finally:
            # Also where a node could not go on with its new driver.
            with trio.CancelScope(shield=True):
                await ended.aclose()

    @asynccontextmanager
    async def _suspended(self) -> AsyncIterator[None]:
        """The body runs with nothing under way in the nodes, and their storage in order.

        That takes those below, so each is at rest after those above, and goes on before them.
        """
        async with AsyncExitStack() as rest:
            for node in tuple(from_the_top(self._graph.standing.children)):
                if node in self._planned:
                    await rest.enter_async_context(node.at_rest())
                    rest.push_async_callback(_resume, self._graph.archive, node)
                    await _suspend(node)
            yield

    def _check_sizes(self) -> None:
        """A user that relies on a size keeps it."""
        for node, driver in self._planned.items():
            if driver.size_bytes == node.size_bytes:
                continue
            self._graph.hold(node, "an unnamed block device", writes=False, resizes=True).release()
            for upper in self._graph.standing.above(node):
                if upper in self._planned:
                    raise BlockdError(
                        f"Node '{node.name}' gets another size: reopen it first, and node "
                        f"'{upper.name}' on top of it later"
                    )


async def _suspend(node: Node) -> None:
    if not node.read_only:
        await node.keeper.save()
        await node.driver.suspend()


async def _resume(archive: Archive, node: Node) -> None:
    """Let a node go on with the driver that it has now, if that is another one or not."""
    with trio.CancelScope(shield=True):
        try:
            if node.read_only:
                await archive.settle(node)
            else:
                # Before the image is written to, so that this is known to be ours.
                await archive.keep(node)
                await node.driver.resume()
                await node.keeper.resume()
        except BaseException:
            # Its bitmaps, or the storage itself, would miss what is written.
            node.read_only = node.driver.read_only = True
            raise
        finally:
            node.keeper.set_read_only(read_only=node.read_only)
