"""All nodes by name, who uses them, and who may be taken away."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import partial

import trio

from blockd import limits
from blockd.block.accounting import Accounts, Inline
from blockd.block.archive import Archive, NoArchive
from blockd.block.driver import Corruption, Driver
from blockd.block.holds import Follower, Hold
from blockd.block.node import Node
from blockd.block.permissions import Access, Claim, Perm, Role
from blockd.block.places import Places
from blockd.block.recovered import tell_recovered
from blockd.block.standing import Standing
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.objects import Objects

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Graph:
    """The nodes. A node made for its parent alone has a name of ours and goes with the parent."""

    def __init__(
        self,
        tasks: trio.Nursery | None = None,
        bus: Bus | None = None,
        archive: Archive | None = None,
    ) -> None:
        """``tasks``: for the drivers that need a task of their own, as long as they are open.

        ``bus``: for what nodes have to tell.
        """
        self.tasks = tasks
        self._bus = bus or Bus()
        #: Where the bitmaps are kept that outlive their nodes.
        self.archive: Archive = archive or NoArchive()
        #: What the options of nodes may name.
        self.objects = Objects()
        self._nodes: dict[str, Node] = {}
        #: Nodes that the administrator named, and may therefore delete.
        self._owned: set[Node] = set()
        self._hidden: set[Node] = set()
        self.standing = Standing()
        self.places = Places(self.standing)
        #: Nodes that lost their last user, who was all that they were there for.
        self._left: list[Node] = []
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
        mine = {node, *self.standing.below(node)}
        storage = {each.driver.identity for each in mine} - {None}
        for other in self:
            if other in mine or other.read_only or self.standing.children[other]:
                continue
            if other.driver.identity in storage:
                raise BlockdError(
                    f"'{other.driver.filename}' is open for writing as node '{other.name}' too"
                )

    def find(self, name: str) -> Node | None:
        """The node called ``name``, if there is one that commands may use."""
        node = self._nodes.get(name)
        return None if node in self._hidden else node

    def hide(self, node: Node) -> None:
        """Let commands not find ``node``, until ``show``."""
        self._hidden.add(node)

    def show(self, node: Node) -> None:
        self._hidden.discard(node)

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

        ``hidden``: commands don't find it, because it goes with the job that it was made for, or
        is not ready.
        Raises ``BlockdError``, and then leaves the driver open.
        """
        if name is None:
            self._made += 1
            name = f"#block{self._made:03d}"
        else:
            self.check_name(name)
        for child in driver.children.values():
            if self._nodes.get(child.name) is not child:
                # Such as that of a job which ended while the driver was being opened.
                raise BlockdError(f"Node '{child.name}' has been removed meanwhile")
        node = Node(name, driver)
        driver.on_corruption = partial(self._tell_corruption, node)
        self.standing.children[node] = {}
        for role, child in driver.children.items():
            self.standing.link(node, role, child)
        try:
            self.standing.settle()
        except BlockdError:
            self.standing.unlink_all(node)
            raise
        self._nodes[name] = node
        if owned:
            self._owned.add(node)
        if hidden:
            self._hidden.add(node)
        return node

    def _tell_corruption(self, node: Node, corruption: Corruption) -> None:
        self._bus.publish(
            "BLOCK_IMAGE_CORRUPTED",
            {
                "device": "",
                "node-name": node.name,
                "msg": corruption.reason,
                "fatal": corruption.fatal,
            },
        )

    def tell_inconsistent(self, node: Node) -> None:
        """Tell of the bitmaps that came back so with a node which has just been made."""
        for bitmap in node.bitmaps.list():
            if bitmap.inconsistent and bitmap.reason is not None:
                tell_recovered(self._bus, node.name, bitmap, bitmap.reason)

    def check_storage(self, driver: Driver) -> None:
        """Raise ``BlockdError`` where a node stands on the same storage already."""
        for node in self:
            if driver.identity is not None and node.driver.identity == driver.identity:
                raise BlockdError(f"'{driver.filename}' is in use: node '{node.name}' stands on it")

    def accounts(self, node: Node) -> Accounts:
        """What ``node`` was asked for since it was made."""
        return node.accounts.total([(node.inline, 0), *self._inlines_above(node)])

    def _inlines_above(self, node: Node) -> Iterator[tuple[Inline, int]]:
        for parent, _ in self.standing.parents(node):
            shift = parent.driver.inline_offset_bytes
            if shift is not None:
                yield parent.inline, shift
                yield from ((inline, far + shift) for inline, far in self._inlines_above(parent))

    async def resize(self, node: Node, size_bytes: int) -> None:
        """Change the size of ``node``, and of those it stands on; those above follow.

        Raises ``BlockdError`` where a user relies on the size of one of them; ``OSError``.
        """
        node.users.check_not_busy(Role.TARGET, Role.BACKING)
        hold = self.hold(node, "an unnamed block device", writes=False, resizes=True)
        try:
            await self.resize_held(node, size_bytes)
        finally:
            hold.release()

    async def resize_held(self, node: Node, size_bytes: int) -> None:
        """As ``resize``, for one who holds the node by ``hold_to_fill``."""
        try:
            await node.resize(size_bytes)
        finally:
            for each in self.standing.written(node):
                for upper in self.standing.above(each):
                    upper.child_changed()

    def hold_to_fill(self, node: Node) -> Hold:
        """Use ``node`` to put a whole image into it: write to it, and resize it as needed.

        Raises ``BlockdError`` where another user forbids that.
        """
        node.users.check_not_busy(Role.SOURCE, Role.TARGET)
        return self.hold(node, "an unnamed block device", writes=True, resizes=True)

    def hold(
        self,
        node: Node,
        user: str,
        role: Role = Role.ROOT,
        *,
        writes: bool,
        resizes: bool = False,
        alone: bool = False,
        follower: Follower | None = None,
    ) -> Hold:
        """Use ``node``, and thereby all that it stands on.

        ``alone``: whatever is written to the storage below must pass this node, as a view of an
        instant needs it. ``follower``: the user, if it is to go along where another node takes
        the place of this one. Raises ``BlockdError`` where another user forbids it.
        """
        needs = (Perm.WRITE if writes else Perm.NONE) | (Perm.RESIZE if resizes else Perm.NONE)
        claim = Claim(user, role, Access(needs), alone)
        hold = Hold(node, claim, follower, self._drop)
        self.standing.holds.append(hold)
        try:
            # Of two conflicts QEMU tells of that with what this user needs.
            self.standing.settle()
            if not resizes:
                # Whoever does not change the size relies on it.
                claim.access = Access(needs, Perm.WRITE)
                self.standing.settle()
        except BlockdError:
            hold.release()
            raise
        return hold

    @contextmanager
    def taken(self, node: Node, claim: Claim) -> Iterator[None]:
        """The body runs with this claim on ``node``, for one above it that is being made.

        Raises ``BlockdError`` where another user forbids it.
        """
        node.users.add(claim)
        try:
            self.standing.settle()
            yield
        finally:
            node.users.remove(claim)
            self.standing.settle()

    def _drop(self, hold: Hold) -> None:
        self.standing.holds.remove(hold)
        self.standing.settle()
        if hold.node not in self._owned and hold.node not in self._hidden:
            self._left.append(hold.node)

    async def remove_left(self) -> None:
        """Remove the nodes that nobody named and nobody uses any more."""
        left, self._left = self._left, []
        await self.remove_unneeded(left)

    def is_owned(self, node: Node) -> bool:
        """Whether it was made for itself, and does not go with the node above."""
        return node in self._owned

    async def retire(self, node: Node) -> None:
        """Make ``node`` read-only, on which an overlay has been put; others may read its storage.

        Those that were made for it alone become read-only with it. Where somebody needs to write,
        or it can't be flushed, it stays as it is.
        """
        if any(Perm.WRITE in claim.access.needs for claim in node.users):
            return
        try:
            await node.make_read_only()
        except OSError as error:
            _log.warning("node '%s' stays writable: %s", node.name, error)
            return
        await self.archive.settle(node)
        self.standing.settle()
        for role, (child, _) in tuple(self.standing.children[node].items()):
            if role is not Role.BACKING and child not in self._owned and not child.read_only:
                await self.retire(child)

    # -- the end of a node ---------------------------------------------------------------------

    def find_owned(self, name: str) -> Node:
        """The node that ``blockdev-del`` may take away. Raises ``BlockdError``."""
        node = self._nodes.get(name)
        if node is None:
            raise BlockdError(f"Failed to find node with node-name='{name}'")
        # While a job reads a node, QEMU's exports are on the filter above it.
        if node.users.of(Role.ROOT) and not node.users.of(Role.SOURCE):
            raise BlockdError(f"Node {name} is in use")
        node.users.check_not_busy(Role.TARGET, Role.BACKING)
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
        async with AsyncExitStack() as cleanup:
            # From the last to the first, whatever fails on the way.
            cleanup.push_async_callback(self._remove_from_below, node)
            try:
                if not node.read_only:
                    await _put_in_order(node)
            except BaseException:
                async with self._closing(node):
                    raise
            async with self._closing(node):
                pass

    @asynccontextmanager
    async def _closing(self, node: Node) -> AsyncIterator[None]:
        """Where the body raises, the archive hears that the image is not as it should be."""
        with trio.CancelScope(shield=True):
            async with self.archive.closing(node):
                try:
                    yield
                finally:
                    await node.close()

    async def _remove_from_below(self, node: Node) -> None:
        children = self.standing.unlink_all(node)
        self.standing.settle()
        for each in self:
            each.owe_no_flush(node)
        await self.remove_unneeded(children)

    async def remove_unneeded(self, nodes: Iterable[Node]) -> None:
        """Remove those of ``nodes`` that were made for others, and that nobody stands on now.

        Each is, whatever becomes of the others; of their errors the last is raised.
        """
        async with AsyncExitStack() as cleanup:
            for node in reversed(list(nodes)):
                cleanup.push_async_callback(self._remove_if_unneeded, node)

    async def _remove_if_unneeded(self, node: Node) -> None:
        there = self._nodes.get(node.name) is node
        if there and not node.users and node not in self._owned:
            await self.remove(node)

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


async def _put_in_order(node: Node) -> None:
    """Bring all that was written to stable storage, and then the bitmaps that speak of it."""
    try:
        await node.flush()
    except OSError as error:
        node.keeper.tell_loss(error)
        raise
    await node.keeper.save()
