"""blockdev-snapshot and blockdev-snapshot-sync: each alone, or with others in a transaction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from blockd.block import Node, Role
from blockd.errors import BlockdError
from blockd.qmp.commands.action import Action, Change, carry_out
from blockd.qmp.commands.overlay_file import OverlayFile, open_overlay, rehearse_overlay
from blockd.qmp.services import Services
from blockd.qmp.types.snapshot import BlockdevSnapshot, BlockdevSnapshotSync


async def blockdev_snapshot(services: Services, arguments: BlockdevSnapshot) -> None:
    await carry_out(services, [SnapshotToNode(services, arguments)])


async def blockdev_snapshot_sync(services: Services, arguments: BlockdevSnapshotSync) -> None:
    await carry_out(services, [SnapshotToFile(services, arguments)])


class _Snapshot(Action):
    """Put an overlay on a node. What is refused is told in QEMU's order."""

    groupable = False

    def __init__(self, services: Services, name: str, device: str) -> None:
        self._services = services
        self._graph = services.graph
        self._name = name
        self._device = device
        #: The node as it was found first, and how it was called in headers then.
        self._staged: Node | None = None
        self._filename = ""
        self._flushed = True

    async def stage(self) -> None:
        self._staged = self._graph.find(self._name)
        if self._staged is None:
            return
        self._filename = self._staged.driver.filename
        if self._staged.read_only:
            return
        try:
            # So that little is left to be made durable when guests wait.
            await self._staged.flush()
        except OSError:
            self._flushed = False

    @abstractmethod
    def _find_overlay(self) -> Node:
        """Raises ``BlockdError``."""

    def nodes(self) -> Iterable[Node]:
        return () if self._staged is None else (self._staged,)

    def take_effect(self) -> Change:
        node = self._graph.get(self._name, device=self._device)
        node.users.check_not_busy(Role.TARGET, Role.BACKING)
        if node is not self._staged:
            raise BlockdError(
                f"Node '{node.name}' was made by this transaction: put an overlay on it in another"
            )
        if not self._flushed:
            raise BlockdError("IO error has occurred")
        overlay = self._find_overlay()
        _check_overlay(overlay)
        return Change(undo=self._graph.places.put_over(overlay, node))

    async def settle(self, *, committed: bool) -> None:
        if committed and self._staged is not None:
            await self._graph.retire(self._staged)
            for above in self._graph.standing.above(self._staged):
                # It stands on another image now.
                await self._graph.archive.keep(above)


class SnapshotToNode(_Snapshot):
    """blockdev-snapshot."""

    def __init__(self, services: Services, arguments: BlockdevSnapshot) -> None:
        super().__init__(services, arguments.node, arguments.node)
        self._overlay_name = arguments.overlay

    def nodes(self) -> Iterable[Node]:
        overlay = self._graph.find(self._overlay_name)
        return (*super().nodes(), *(() if overlay is None else (overlay,)))

    def _find_overlay(self) -> Node:
        return self._graph.get(self._overlay_name, device=self._overlay_name)


class SnapshotToFile(_Snapshot):
    """blockdev-snapshot-sync."""

    def __init__(self, services: Services, arguments: BlockdevSnapshotSync) -> None:
        super().__init__(services, arguments.node_name or "", arguments.device or "")
        self._arguments = arguments
        self._overlay: OverlayFile | None = None
        self._refusal: BlockdError | None = None

    async def stage(self) -> None:
        await super().stage()
        if self._staged is None or not self._flushed:
            return
        try:
            self._staged.users.check_not_busy(Role.TARGET, Role.BACKING)
            self._check_overlay_name()
            make = rehearse_overlay if self._services.rehearsing else open_overlay
            self._overlay = await make(self._graph, self._arguments, self._staged)
        except BlockdError as error:
            self._refusal = error

    def _find_overlay(self) -> Node:
        self._check_overlay_name()
        if self._refusal is not None:
            raise self._refusal
        if self._staged is not None and self._staged.driver.filename != self._filename:
            # The overlay's header says something else.
            raise BlockdError(
                f"Node '{self._staged.name}' was put on another by this transaction: "
                "put an overlay in a file on it in another"
            )
        assert self._overlay is not None, "the node was there, so the overlay was opened"
        return self._overlay.node

    def _check_overlay_name(self) -> None:
        name = self._arguments.snapshot_node_name
        if self._arguments.node_name is not None and name is None:
            raise BlockdError("New overlay node-name missing")
        own = None if self._overlay is None else self._overlay.node
        if any(node.name == name and node is not own for node in self._graph):
            raise BlockdError("New overlay node-name already in use")

    def take_effect(self) -> Change:
        change = super().take_effect()
        assert self._overlay is not None
        overlay = self._overlay.node
        self._graph.show(overlay)

        def undo() -> None:
            self._graph.hide(overlay)
            change.undo()

        return Change(undo)

    async def settle(self, *, committed: bool) -> None:
        if self._overlay is None:
            return
        if not committed:
            await self._overlay.remove()
            return
        await self._overlay.keep()
        await super().settle(committed=True)
        if not self._overlay.node.users:
            # It was made for those who follow, and nobody does.
            await self._graph.remove(self._overlay.node)


def _check_overlay(overlay: Node) -> None:
    """Raise ``BlockdError`` unless it can be put on a node."""
    if overlay.users.of(Role.ROOT):
        raise BlockdError("The overlay is already in use")
    if overlay.backing is not None:
        raise BlockdError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise BlockdError("The overlay does not support backing images")
    # QEMU does it, and the job goes on writing to what is now the disk.
    overlay.users.check_not_busy(Role.TARGET)
