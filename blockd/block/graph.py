"""All nodes by name, who stands on whom, and who may be taken away."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress

import trio

from blockd import limits
from blockd.block.accounting import Accounts, Inline
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
        self._hidden: set[Node] = set()
        #: What each node stands on, with its claim there.
        self._below: dict[Node, list[tuple[Node, Claim]]] = {}
        self._made = 0

    def __iter__(self) -> Iterator[Node]:
        """The nodes, newest first."""
        return iter(tuple(reversed(self._nodes.values())))

    def get(self, name: str, *, device: str = "") -> Node:
        """The node called ``name``; ``device`` only fills QEMU's sentence where none is.

        Raises ``BlockdError``.
        """
        node = self.find(name)
        if node is None:
            raise BlockdError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    def check_no_other_writer(self, node: Node) -> None:
        """Raise ``BlockdError`` where the node's storage is open for writing somewhere else.

        What is written there passes neither the node nor its bitmaps.
        """
        mine = {node, *self.below(node)}
        storage = {each.driver.identity for each in mine} - {None}
        for other in self:
            if other in mine or other.read_only or self._below[other]:
                continue
            if other.driver.identity in storage:
                raise BlockdError(
                    f"'{other.driver.filename}' is open for writing as node '{other.name}' too"
                )

    def find(self, name: str) -> Node | None:
        """The node called ``name``, if there is one that commands may use."""
        node = self._nodes.get(name)
        return None if node in self._hidden else node

    def check_name(self, name: str) -> None:
        """Raise ``BlockdError`` unless a new node may be called ``name``."""
        if not _NAME.fullmatch(name):
            raise BlockdError(f"Invalid node-name: '{name}'")
        if len(name.encode()) > limits.NODE_NAME_BYTES:
            raise BlockdError("Node name too long")
        if name in self._nodes:
            raise BlockdError(f"Duplicate nodes with node-name='{name}'")

    def add(self, name: str | None, driver: Driver, *, owned: bool, hidden: bool = False) -> Node:
        """Put a node over ``driver`` and its children in. ``name`` None: it gets one of ours.

        ``hidden``: commands don't find it, because it goes with the job that it was made for.
        Raises ``BlockdError``, and then leaves the driver open.
        """
        if name is None:
            self._made += 1
            name = f"#block{self._made:03d}"
        else:
            self.check_name(name)
        node = Node(name, driver)
        self._below[node] = self._claim_children(node)
        self._nodes[name] = node
        if owned:
            self._owned.add(node)
        if hidden:
            self._hidden.add(node)
        return node

    def check_storage(self, driver: Driver) -> None:
        """Raise ``BlockdError`` where a node stands on the same storage already."""
        for node in self:
            if driver.identity is not None and node.driver.identity == driver.identity:
                raise BlockdError(f"'{driver.filename}' is in use: node '{node.name}' stands on it")

    def _claim_children(self, node: Node) -> list[tuple[Node, Claim]]:
        user, shares_resize = f"node '{node.name}'", node.driver.follows_child_size
        return [
            (child, child.users.claim(user, role, writes=False, shares_resize=shares_resize))
            for role, child in node.driver.children.items()
        ]

    def below(self, node: Node) -> Iterator[Node]:
        """The nodes that ``node`` stands on, down to the storage, each once and nearest first."""
        seen = {node: None}

        def look(above: Node) -> None:
            for child, _ in self._below[above]:
                if child not in seen:
                    seen[child] = None
                    look(child)

        look(node)
        return itertools.islice(seen, 1, None)

    def _written(self, node: Node) -> Iterator[Node]:
        """``node``, and those below it that a write to it may reach."""
        yield node
        for child, claim in self._below[node]:
            if claim.role is not Role.BACKING:
                yield from self._written(child)

    def above(self, node: Node) -> Iterator[Node]:
        """The nodes that stand on ``node``, nearest first."""
        for parent, children in self._below.items():
            if any(child is node for child, _ in children):
                yield parent
                yield from self.above(parent)

    def accounts(self, node: Node) -> Accounts:
        """What ``node`` was asked for since it was made."""
        return node.accounts.total([(node.inline, 0), *self._inlines_above(node)])

    def _inlines_above(self, node: Node) -> Iterator[tuple[Inline, int]]:
        for parent, children in self._below.items():
            shift = parent.driver.inline_offset_bytes
            if shift is not None and any(child is node for child, _ in children):
                yield parent.inline, shift
                yield from ((inline, far + shift) for inline, far in self._inlines_above(parent))

    async def resize(self, node: Node, size_bytes: int) -> None:
        """Change the size of ``node``, and of those it stands on; those above follow.

        Raises ``BlockdError`` where a user relies on the size of one of them; ``OSError``.
        """
        node.users.check_no_job(Role.TARGET)
        hold = self._hold_to_resize(node)
        try:
            await node.resize(size_bytes)
        finally:
            hold.release()
            for each in self._written(node):
                for upper in self.above(each):
                    upper.child_resized()

    def _hold_to_resize(self, node: Node) -> Hold:
        hold = Hold()
        try:
            self._claim_size(hold, node, "an unnamed block device", Role.ROOT)
            for parent in self._written(node):
                for child, standing in self._below[parent]:
                    if standing.role is not Role.BACKING:
                        self._claim_size(hold, child, f"node '{parent.name}'", standing.role)
        except BlockdError:
            hold.release()
            raise
        return hold

    @staticmethod
    def _claim_size(hold: Hold, node: Node, user: str, role: Role) -> None:
        claim = node.users.claim(user, role, writes=False, resizes=True, shares_resize=True)
        hold.add(node, claim)

    def hold(
        self, node: Node, user: str, role: Role = Role.ROOT, *, writes: bool, alone: bool = False
    ) -> Hold:
        """Use ``node``, and thereby all that it stands on.

        ``alone``: whatever is written to the storage below must pass this node, as a view of an
        instant needs it. Raises ``BlockdError`` where another user's claim forbids that.
        """
        if writes and any(each.read_only for each in self._written(node)):
            raise BlockdError("Block node is read-only")
        hold = Hold()
        try:
            hold.add(node, node.users.claim(user, role, writes=writes))
            self._hold_below(hold, node, writes=writes, alone=alone)
        except BlockdError:
            hold.release()
            raise
        return hold

    def _hold_below(self, hold: Hold, node: Node, *, writes: bool, alone: bool) -> None:
        for child, standing in self._below[node]:
            role = standing.role
            writes_child = writes and role is not Role.BACKING
            claim = child.users.claim(
                f"node '{node.name}'", role, writes=writes_child, shares_writes=not alone
            )
            hold.add(child, claim)
            self._hold_below(hold, child, writes=writes_child, alone=alone)

    def find_owned(self, name: str) -> Node:
        """The node that ``blockdev-del`` may take away. Raises ``BlockdError``."""
        node = self._nodes.get(name)
        if node is None:
            raise BlockdError(f"Failed to find node with node-name='{name}'")
        # While a job reads a node, the peer's exports are on the filter above it.
        if node.users.of(Role.ROOT) and not node.users.of(Role.SOURCE):
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
        self._hidden.discard(node)
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
        """Flush all nodes, then remove them from the top down; errors are raised at the end.

        One that hangs does not keep the others from being flushed. Those that somebody still
        uses, such as a job that does not end, are flushed and left.
        """
        errors: list[Exception] = []

        async def flush(node: Node) -> None:
            try:
                await node.flush()
            except OSError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for node in self:
                if not node.read_only:
                    nursery.start_soon(flush, node)
        while (free := next((node for node in self if not node.users), None)) is not None:
            with suppress(OSError):  # it was told of above
                await self.remove(free)
        if errors:
            raise ExceptionGroup("some nodes could not be flushed", errors)
