"""Transactions: several commands that take effect at one instant, all or none."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from msgspec import field

from blockd.qmp.types.backup import BlockdevBackup, DriveBackup
from blockd.qmp.types.base import Command, Object
from blockd.qmp.types.bitmap import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapClear,
    BlockDirtyBitmapDisable,
    BlockDirtyBitmapEnable,
    BlockDirtyBitmapMerge,
    BlockDirtyBitmapRemove,
)
from blockd.qmp.types.snapshot import BlockdevSnapshot, BlockdevSnapshotSync


class TransactionAction(Object, kw_only=True):
    """One command of a transaction: its name, and its arguments in ``data``."""


class AbortData(Object, kw_only=True):
    """Has no members."""


class Abort(TransactionAction, tag_field="type", tag="abort", kw_only=True):
    """Refuse the transaction: for testing."""

    data: AbortData


class AddBitmap(TransactionAction, tag_field="type", tag="block-dirty-bitmap-add", kw_only=True):
    """Make a bitmap."""

    data: BlockDirtyBitmapAdd


class RemoveBitmap(
    TransactionAction, tag_field="type", tag="block-dirty-bitmap-remove", kw_only=True
):
    """Forget a bitmap; to later actions it is in use."""

    data: BlockDirtyBitmapRemove


class ClearBitmap(
    TransactionAction, tag_field="type", tag="block-dirty-bitmap-clear", kw_only=True
):
    """Mark everything as clean."""

    data: BlockDirtyBitmapClear


class EnableBitmap(
    TransactionAction, tag_field="type", tag="block-dirty-bitmap-enable", kw_only=True
):
    """Record writes from now on."""

    data: BlockDirtyBitmapEnable


class DisableBitmap(
    TransactionAction, tag_field="type", tag="block-dirty-bitmap-disable", kw_only=True
):
    """Record no more writes."""

    data: BlockDirtyBitmapDisable


class MergeBitmaps(
    TransactionAction, tag_field="type", tag="block-dirty-bitmap-merge", kw_only=True
):
    """Mark in one bitmap what is dirty in any of several."""

    data: BlockDirtyBitmapMerge


class BackUpToNode(TransactionAction, tag_field="type", tag="blockdev-backup", kw_only=True):
    """Begin a backup to a node."""

    data: BlockdevBackup


class BackUpToFile(TransactionAction, tag_field="type", tag="drive-backup", kw_only=True):
    """Begin a backup to a file. The node must be there before the transaction."""

    data: DriveBackup


class SnapshotToNode(TransactionAction, tag_field="type", tag="blockdev-snapshot", kw_only=True):
    """Put an overlay on a node."""

    data: BlockdevSnapshot


class SnapshotToFile(
    TransactionAction, tag_field="type", tag="blockdev-snapshot-sync", kw_only=True
):
    """Put an overlay in a file on a node; later actions find it by its name."""

    data: BlockdevSnapshotSync


AnyAction = (
    Abort
    | AddBitmap
    | RemoveBitmap
    | ClearBitmap
    | EnableBitmap
    | DisableBitmap
    | MergeBitmaps
    | BackUpToNode
    | BackUpToFile
    | SnapshotToNode
    | SnapshotToFile
)


class TransactionProperties(Object, kw_only=True):
    """``completion-mode``: whether each job ends by itself (``individual``), or all together.

    ``grouped``: a job that has done its work waits for the others; then all end well at one
    instant. Where one fails, or is cancelled, all others are cancelled.
    """

    completion_mode: Literal["individual", "grouped"] = "individual"


class ActionError(Object, kw_only=True):
    """What a command's reply would say: the ``class`` of the error, and its description."""

    error_class: str = field(name="class")
    desc: str


class ActionResult(Object, kw_only=True):
    """What would become of an action, ``type``; without ``error`` it would take effect."""

    type: str
    error: ActionError | None = None


class TransactionResult(Object, kw_only=True):
    """``actions``: of a dry run only, and in the order of its actions."""

    actions: list[ActionResult] | None = None


class Transaction(Command, kw_only=True):
    """Carry out several commands at one instant, as guests see it: all of them, or none.

    They take effect in order, and later ones see what earlier ones did. Where one is refused, its
    error is answered, and what the others did is undone. Jobs begin when nothing was refused.

    ``dry-run``: change nothing, but tell for each action whether it would be refused; those
    behind one that is are tried without it. No target is made or changed. The answer says what
    was so at that instant: what other clients do may let the real one end otherwise.
    """

    command: ClassVar[str] = "transaction"
    returns: ClassVar[Any] = TransactionResult

    actions: list[AnyAction]
    properties: TransactionProperties | None = None
    dry_run: bool = False
