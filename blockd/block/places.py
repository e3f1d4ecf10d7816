"""Other nodes in the place of some, other drivers in nodes, while those in use stand still."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Perm, Role
from blockd.block.settling import from_the_top, in_order_of_waits
from blockd.block.standing import Standing
from blockd.errors import BlockdError


class Places:
    """The places of a graph's nodes: what stands there changes at one instant, or not at all."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    @asynccontextmanager
    async def quiesced(self, nodes: Iterable[Node]) -> AsyncIterator[None]:
        """The body runs with no write to these nodes in flight, and none beginning.

        Nor is there one on its way to them, in a node above or an export: none will come out
        at a node whose place another one has taken meanwhile.
        """
        affected = {each for node in nodes for each in (node, *self._standing.above(node))}
        async with AsyncExitStack() as stopped:
            for hold in tuple(self._standing.holds):
                if hold.follower is not None and hold.node in affected:
                    stopped.enter_context(hold.node.driver.hurried())
                    await stopped.enter_async_context(hold.follower.quiesced())
            for node in tuple(in_order_of_waits(self._standing.children, self._standing.holds)):
                if node in affected:
                    await stopped.enter_async_context(node.quiesced())
            yield

    def change_drivers(self, drivers: Mapping[Node, Driver]) -> list[Node]:
        """Let nodes that are at rest have these drivers, and stand on what those stand on.

        Returns what they stood on before, for ``remove_unneeded``. Raises ``BlockdError`` where
        users of a node are in the way, and then nothing has changed.
        """
        self._check_writers({node for node, driver in drivers.items() if driver.read_only})
        before = [child for node in drivers for child in node.driver.children.values()]
        with ExitStack() as undo:
            undo.callback(self._standing.settle)
            for node, driver in drivers.items():
                undo.callback(self._change_driver, node, node.driver)
                self._change_driver(node, driver)
            self._standing.settle()
            undo.pop_all()
        for node in drivers:
            for each in (node, *self._standing.above(node)):
                each.child_changed()
        return before

    def _check_writers(self, read_only: set[Node]) -> None:
        """Raise ``BlockdError`` where one of these, which become read-only, has to be written to.

        What stands on another of them writes no more.
        """
        children = self._standing.children
        ending = {claim for node in read_only for _, claim in children[node].values()}
        for node in from_the_top(children):
            claims = [claim for claim in node.users if claim not in ending]
            if node in read_only and any(Perm.WRITE in each.access.needs for each in claims):
                raise BlockdError(
                    f"Read-only block node '{node.name}' cannot support read-write users"
                )

    def _change_driver(self, node: Node, driver: Driver) -> None:
        for role in list(self._standing.children[node]):
            self._standing.unlink(node, role)
        node.change_driver(driver)
        for role, child in driver.children.items():
            self._standing.link(node, role, child)

    def put_over(self, top: Node, node: Node) -> Callable[[], None]:
        """Put ``top`` between ``node`` and its users: exports and nodes above follow, jobs stay.

        An overlay gets ``node`` as its backing file; a filter stands on it already. Only while
        ``node`` is ``quiesced``. Returns what undoes it at the same instant. Raises
        ``BlockdError``, and then nothing has changed.
        """
        if top in (node, *self._standing.below(node)):
            raise BlockdError(
                f"Making '{node.name}' a backing child of '{top.name}' would create a cycle"
            )
        moved = {top, *self._standing.below(top)}
        parents = [each for each in self._standing.parents(node) if each[0] not in moved]
        self._check_size(node, top)
        with ExitStack() as undo:
            undo.callback(self._standing.settle)
            if node not in top.driver.children.values():
                self._replace_child(undo, top, Role.BACKING, node)
                top.owe_flush(node)
                undo.callback(top.owe_no_flush, node)
            for hold in self._standing.holds:
                if hold.node is node and hold.follower is not None:
                    hold.move(top)
                    undo.callback(hold.move, node)
            for parent, role in parents:
                self._replace_child(undo, parent, role, top)
            self._standing.settle()
            return undo.pop_all().close

    def _check_size(self, node: Node, top: Node) -> None:
        """Nobody may find a part of what he uses gone, and a job's node must not even grow."""
        if top.size_bytes < node.size_bytes and node.users:
            raise BlockdError(
                f"Node '{top.name}' is smaller than node '{node.name}', which is in use"
            )
        for each in self._standing.above(node):
            if any(claim.fills for claim in each.users):
                # The job may be about to write to what is below now.
                each.users.check_not_busy(Role.TARGET)
            if top.size_bytes != node.size_bytes and each.users.of(Role.SOURCE):
                raise BlockdError(
                    f"Node '{top.name}' is larger than node '{node.name}', "
                    f"and a job uses node '{each.name}' on top of that"
                )

    def _replace_child(self, undo: ExitStack, parent: Node, role: Role, child: Node | None) -> None:
        before, _ = self._standing.children[parent].get(role, (None, None))
        parent.driver.replace_child(role, child)
        undo.callback(self._replace_child, ExitStack(), parent, role, before)
        if before is not None:
            self._standing.unlink(parent, role)
        if child is not None:
            self._standing.link(parent, role, child)
        for each in (parent, *self._standing.above(parent)):
            each.child_changed()
