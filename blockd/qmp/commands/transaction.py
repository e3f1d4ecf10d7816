"""transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from blockd.block import Coming, Node
from blockd.errors import BlockdError
from blockd.qmp.commands import bitmap
from blockd.qmp.commands.action import Action, Change, at_one_instant, carry_out
from blockd.qmp.commands.backup import BackUpToFile, BackUpToNode
from blockd.qmp.commands.snapshot import SnapshotToFile, SnapshotToNode
from blockd.qmp.dispatch import describe
from blockd.qmp.services import Services
from blockd.qmp.types import transaction as types
from blockd.qmp.types.bitmap import BlockDirtyBitmapAdd, BlockDirtyBitmapRemove


class _Abort(Action):
    groupable = False

    def take_effect(self) -> Change:
        raise BlockdError("Transaction aborted using Abort action")


class _ChangeBitmap(Action):
    """One of the commands for bitmaps."""

    def __init__(
        self, services: Services, arguments: Any, do: Callable[[Services, Any], Change]
    ) -> None:
        self._services = services
        self._arguments = arguments
        self._do = do

    def nodes(self) -> Iterable[Node]:
        node = self._services.graph.find(self._arguments.node)
        return () if node is None else (node,)

    def take_effect(self) -> Change:
        return self._do(self._services, self._arguments)

    async def settle(self, *, committed: bool) -> None:
        if committed:
            for node in self.nodes():
                await self._services.graph.archive.keep(node)


class _AddBitmap(_ChangeBitmap):
    """One that could not be kept is refused before anything is done that can't be undone.

    That is not known of the nodes that the transaction itself makes.
    """

    def __init__(self, services: Services, arguments: BlockDirtyBitmapAdd) -> None:
        super().__init__(services, arguments, bitmap.do_add)
        self._coming: Coming | None = None
        self._can_keep = True

    async def stage(self) -> None:
        await super().stage()
        if not self._services.rehearsing:
            self._coming, self._can_keep = await bitmap.expect(self._services, self._arguments)

    def take_effect(self) -> Change:
        change = super().take_effect()
        if not self._can_keep:
            change.undo()
            raise bitmap.cannot_keep(self._arguments)
        return change

    async def settle(self, *, committed: bool) -> None:
        if self._coming is not None:
            self._coming.over = True
            committed = committed or self._can_keep
        await super().settle(committed=committed)


class _RemoveBitmap(_ChangeBitmap):
    """The image forgets a persistent one once the transaction has taken effect."""

    def __init__(self, services: Services, arguments: BlockDirtyBitmapRemove) -> None:
        super().__init__(services, arguments, bitmap.do_remove)
        self._done_to: Node | None = None

    def take_effect(self) -> Change:
        change = super().take_effect()
        (self._done_to,) = self.nodes()
        return change

    async def settle(self, *, committed: bool) -> None:
        if committed and self._done_to is not None:
            await self._done_to.keeper.forget_removed(self._arguments.name)
        await super().settle(committed=committed)


def _changes(do: Callable[[Services, Any], Change]) -> Callable[[Services, Any], Action]:
    return lambda services, arguments: _ChangeBitmap(services, arguments, do)


#: What makes the action of each declaration out of its ``data``.
ACTIONS: dict[type[types.TransactionAction], Callable[[Services, Any], Action]] = {
    types.Abort: lambda _services, _arguments: _Abort(),
    types.AddBitmap: _AddBitmap,
    types.RemoveBitmap: _RemoveBitmap,
    types.ClearBitmap: _changes(bitmap.do_clear),
    types.EnableBitmap: _changes(bitmap.do_enable),
    types.DisableBitmap: _changes(bitmap.do_disable),
    types.MergeBitmaps: _changes(bitmap.do_merge),
    types.BackUpToNode: BackUpToNode,
    types.BackUpToFile: BackUpToFile,
    types.SnapshotToNode: SnapshotToNode,
    types.SnapshotToFile: SnapshotToFile,
}


async def transaction(services: Services, arguments: types.Transaction) -> dict[str, Any]:
    if arguments.dry_run:
        return {"actions": await _rehearse(services.rehearsal(), arguments)}
    await carry_out(services, _actions(services, arguments), grouped=_grouped(arguments))
    return {}


def _grouped(arguments: types.Transaction) -> bool:
    properties = arguments.properties
    return properties is not None and properties.completion_mode == "grouped"


def _actions(services: Services, arguments: types.Transaction) -> list[Action]:
    actions: list[Action] = []
    for declared in arguments.actions:
        action = ACTIONS[type(declared)](services, declared.data)
        if _grouped(arguments) and not action.groupable:
            raise BlockdError(
                f"Action '{_name(declared)}' does not support "
                "transaction property completion-mode = grouped"
            )
        actions.append(action)
    return actions


async def _rehearse(services: Services, arguments: types.Transaction) -> list[dict[str, Any]]:
    """Try every action, and undo all of them, at one instant; tell what each would answer."""
    results: list[dict[str, Any]] = [{"type": _name(declared)} for declared in arguments.actions]
    actions = _actions(services, arguments)
    async with at_one_instant(services, actions):
        with ExitStack() as undo:
            for action, result in zip(actions, results, strict=True):
                try:
                    undo.callback(action.take_effect().undo)
                except (BlockdError, OSError) as error:
                    failure = describe(error)
                    result["error"] = {"class": failure.error_class, "desc": failure.message}
    return results


def _name(declared: types.TransactionAction) -> str:
    """The action's command."""
    return str(type(declared).__struct_config__.tag)
