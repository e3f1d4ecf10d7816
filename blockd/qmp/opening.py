"""From a node's options to the node: its children first; after a failure none of them stays.

What an image made along with another inherits is what QEMU lets it inherit: documentation of
``blockdev-add``, "BlockdevOptions", and ``-blockdev`` in qemu(1).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import trio

from blockd import limits
from blockd.block import Driver, Graph, Node, Role
from blockd.errors import BlockdError
from blockd.qmp.types.blockdev import CacheOptions, NodeOptions


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every node has, as they are once those it inherits are settled."""

    read_only: bool
    auto_read_only: bool
    direct: bool
    flushes: bool
    unmap: bool

    def overridden(self, options: NodeOptions) -> Common:
        """What ``options`` says, and these where it says nothing."""
        cache = options.cache or CacheOptions()
        says: dict[str, bool | None] = {
            "read_only": options.read_only,
            "auto_read_only": options.auto_read_only,
            "direct": cache.direct,
            "flushes": None if cache.no_flush is None else not cache.no_flush,
            "unmap": None if options.discard is None else options.discard == "unmap",
        }
        return replace(self, **{name: value for name, value in says.items() if value is not None})

    def inherited(self, role: Role) -> Common:
        """What a child in ``role`` takes from a node with these.

        Discards that reach a child are followed: the node above has decided. A backing file is
        read only.
        """
        if role is Role.BACKING:
            return replace(self, read_only=True, auto_read_only=False, unmap=True)
        return replace(self, unmap=True)


#: A node of its own keeps discarded blocks.
ROOT = Common(read_only=False, auto_read_only=False, direct=False, flushes=True, unmap=False)


class Opening:
    """A node that is being opened, as its driver's opener sees it."""

    def __init__(
        self,
        openers: Openers,
        graph: Graph,
        node_name: str | None,
        common: Common,
        above: int = 0,
        *,
        hidden: bool = False,
    ) -> None:
        """``above``: how many nodes are being made that stand on this one."""
        self.common = common
        self.graph = graph
        self._node_name = node_name
        self._openers = openers
        self._above = above
        self._hidden = hidden
        self._made: list[Node] = []

    async def child(self, role: Role, reference: str | NodeOptions) -> Node:
        """The node for ``role``: one that is there, or one that is made and goes with its parent.

        Raises ``BlockdError``.
        """
        node = await self._child(role, reference)
        if role is Role.FILE:
            await self.graph.archive.look_at(node)
        return node

    async def _child(self, role: Role, reference: str | NodeOptions) -> Node:
        if isinstance(reference, str):
            node = self.graph.get(reference, device=reference)
            if role is Role.FILE:
                # QEMU looks at a node's name when it has the node's file.
                self.check_name()
            return node
        common, above = self.common.inherited(role), self._above + 1
        if above >= limits.NODE_LEVELS:
            # Such as images that name each other as their backing files.
            raise BlockdError(f"More than {limits.NODE_LEVELS} nodes would stand on each other")
        node = await open_node(
            self._openers,
            self.graph,
            reference,
            common,
            owned=False,
            # Who names it can give it bitmaps, and expects them back.
            top=reference.node_name is not None,
            hidden=self._hidden,
            above=above,
        )
        self._made.append(node)
        return node

    def check_name(self) -> None:
        """Raise ``BlockdError`` unless the node may be called as its options say."""
        if self._node_name is not None:
            self.graph.check_name(self._node_name)

    @property
    def user(self) -> str:
        """What a claim of the node calls it."""
        return "a new node" if self._node_name is None else f"node '{self._node_name}'"

    async def give_up(self) -> None:
        """Remove the children that were made."""
        await self.graph.remove_unneeded(reversed(self._made))


#: Opens a node's storage, given its options; its children come from the ``Opening``.
Opener = Callable[[Opening, Any], Awaitable[Driver]]
#: The opener for each driver's options. A driver plugs in with one entry, and one variant of
#: ``BlockdevOptions``.
Openers = Mapping[type[NodeOptions], Opener]


async def open_node(
    openers: Openers,
    graph: Graph,
    options: NodeOptions,
    inherited: Common = ROOT,
    *,
    owned: bool,
    top: bool = False,
    hidden: bool = False,
    above: int = 0,
) -> Node:
    """Open what ``options`` describes, and put it into the graph with all that it stands on.

    ``top``: it has its bitmaps of the archive although no command owns it, since it will be on top
    or has a name to give it bitmaps by. ``hidden``: commands find neither it nor what is made for
    it. ``above``: how many nodes are being made that stand on this one.

    Raises ``BlockdError``; then the graph is as it was.
    """
    common = inherited.overridden(options)
    opening = Opening(openers, graph, options.node_name, common, above, hidden=hidden)
    try:
        node = await _open(openers, opening, options, owned=owned, top=owned or top)
    finally:
        if not above:
            with trio.CancelScope(shield=True):
                await graph.archive.opening_ended()
    if not hidden:
        graph.show(node)
    return node


async def _open(
    openers: Openers, opening: Opening, options: NodeOptions, *, owned: bool, top: bool
) -> Node:
    """The node with its bitmaps, still hidden."""
    try:
        node = await _open_driver(openers, opening, options, owned=owned)
    except BaseException:
        with trio.CancelScope(shield=True):
            await opening.give_up()
        raise
    await _load_bitmaps(opening.graph, node, top=top)
    return node


async def _open_driver(
    openers: Openers, opening: Opening, options: NodeOptions, *, owned: bool
) -> Node:
    """The node, which is hidden: nobody may write to it before its bitmaps are there."""
    if getattr(options, "filename", None) == "":
        name = type(options).__struct_config__.tag
        raise BlockdError(f"The '{name}' block driver requires a file name")
    if not isinstance(getattr(options, "file", None), str):
        # Before a file is opened for nothing, and perhaps locked against its own second opening.
        opening.check_name()
    driver = await openers[type(options)](opening, options)
    try:
        return opening.graph.add(options.node_name, driver, owned=owned, hidden=True)
    except BaseException:
        # Such as two nodes of one command that wanted the same name.
        with trio.CancelScope(shield=True):
            await driver.close()
        raise


async def _load_bitmaps(graph: Graph, node: Node, *, top: bool) -> None:
    """Give the node those that outlived an earlier one; where that fails, it is removed."""
    try:
        await _take_over_bitmaps(graph, node, top=top)
    except BaseException:
        # An error of the end says less than the one that led to it.
        with trio.CancelScope(shield=True), suppress(OSError):
            await graph.remove(node)
        raise


async def _take_over_bitmaps(graph: Graph, node: Node, *, top: bool) -> None:
    """Those of its image, and of the archive. Raises ``BlockdError``."""

    async def attach() -> None:
        if top:
            await graph.archive.attach(node)
        if not node.read_only and node.keeper.store is not None:
            # Once its bitmaps are marked as in use, the image is not what it was: no matter, if
            # it is known that we have it.
            await graph.archive.keep(node)

    await node.keeper.load(read_only=node.read_only, before_use=attach)
    graph.tell_inconsistent(node)
