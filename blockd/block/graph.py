"""All nodes by name, who stands on whom, and who may be taken away."""

from __future__ import annotations

import re
from collections.abc import Iterator

import trio

from blockd import limits
from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Claim, Role
from blockd.errors import BlockdError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Hold:
    """One user's claims on a node and on those below it."""

    def __init__(self) -> None:
        self._claims: list[tuple[Node, Claim]] = []

    def add(self, node: Node, claim: Claim) -> None:
        self._claims.append((node, claim))

    def release(self) -> None:
        """Give all claims back; nothing happens the second time."""
        while self._claims:
            node, claim = self._claims.pop()
            node.users.release(claim)


class Graph:
    """The nodes. A node made for its parent alone has a name of ours and goes with the parent."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        #: Nodes that the administrator named, and may therefore delete.
        self._owned: set[Node] = set()
        #: What each node stands on, with its claim there.
        self._below: dict[Node, list[tuple[Node, Claim]]] = {}
        self._made = 0

    def __iter__(self) -> Iterator[Node]:
        """The nodes, newest first."""
        return iter(tuple(reversed(self._nodes.values())))

    def get(self, name: str, *, device: str = "") -> Node:
        """The node called ``name``; ``device`` only fills the peer's sentence where none is.

        Raises ``BlockdError``.
        """
        node = self._nodes.get(name)
        if node is None:
            raise BlockdError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    def find(self, name: str) -> Node | None:
        """The node called ``name``, if there is one."""
        return self._nodes.get(name)

    def check_name(self, name: str) -> None:
        """Raise ``BlockdError`` unless a new node may be called ``name``."""
        if not _NAME.fullmatch(name):
            raise BlockdError(f"Invalid node-name: '{name}'")
        if len(name.encode()) > limits.NODE_NAME_BYTES:
            raise BlockdError("Node name too long")
        if name in self._nodes:
            raise BlockdError(f"Duplicate nodes with node-name='{name}'")

    def add(self, name: str | None, driver: Driver, *, owned: bool) -> Node:
        """Put a node over ``driver`` in. ``name`` None: one of ours, which no user can type."""
        if name is None:
            self._made += 1
            name = f"#block{self._made:03d}"
        else:
            self.check_name(name)
        node = Node(name, driver)
        self._nodes[name] = node
        self._below[node] = []
        if owned:
            self._owned.add(node)
        return node

    def put_on(self, parent: Node, child: Node, claim: Claim) -> None:
        """Record that ``parent`` stands on ``child``, by a claim that was made for it."""
        self._below[parent].append((child, claim))

    def below(self, node: Node) -> Iterator[Node]:
        """The nodes that ``node``'s data passes on its way to the storage, nearest first."""
        for child, _ in self._below[node]:
            yield child
            yield from self.below(child)

    def hold(
        self, node: Node, user: str, role: Role = Role.ROOT, *, writes: bool, alone: bool = False
    ) -> Hold:
        """Use ``node``, and thereby all that it stands on.

        ``alone``: whatever is written to the storage below must pass this node, as a view of an
        instant needs it. Raises ``BlockdError`` where another user's claim forbids that.
        """
        if writes and any(each.read_only for each in (node, *self.below(node))):
            raise BlockdError("Block node is read-only")
        hold = Hold()
        try:
            hold.add(node, node.users.claim(user, role, writes=writes))
            above = node
            for each in self.below(node):
                claim = each.users.claim(
                    f"node '{above.name}'", Role.FILE, writes=writes, shares_writes=not alone
                )
                hold.add(each, claim)
                above = each
        except BlockdError:
            hold.release()
            raise
        return hold

    def find_owned(self, name: str) -> Node:
        """The node that ``blockdev-del`` may take away. Raises ``BlockdError``."""
        node = self._nodes.get(name)
        if node is None:
            raise BlockdError(f"Failed to find node with node-name='{name}'")
        if node.users.of(Role.ROOT):
            raise BlockdError(f"Node {name} is in use")
        node.users.check_no_job(Role.TARGET)
        if node not in self._owned:
            raise BlockdError(f"Node {name} is not owned by the monitor")
        if node.users:
            raise BlockdError(f"Block device {name} is in use")
        return node

    async def remove(self, node: Node) -> None:
        """Flush and close ``node``, which nobody uses, and what stood below for it alone.

        A flush that fails is the caller's to report; the node is gone all the same.
        """
        assert not node.users
        del self._nodes[node.name]
        self._owned.discard(node)
        below = self._below.pop(node)
        try:
            if not node.read_only:
                await node.flush()
        finally:
            with trio.CancelScope(shield=True):
                await node.driver.close()
            for child, claim in below:
                child.users.release(claim)
                if not child.users and child not in self._owned:
                    await self.remove(child)

    async def close(self) -> None:
        """Remove every node, from the top down; errors of flushing are raised at the end.

        Those that somebody still uses, such as a job that does not end, are left.
        """
        errors: list[Exception] = []
        while (node := next((node for node in self if not node.users), None)) is not None:
            try:
                await self.remove(node)
            except OSError as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("some nodes could not be flushed", errors)
