"""Dirty bitmaps. All of these commands answer nothing (``{}``)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from blockd.qmp.types.base import Command, Object, UInt32


class BitmapOfNode(Object, kw_only=True):
    """A bitmap of any node."""

    node: str
    name: str


#: A bitmap by name, on the node in question, or of another node.
BitmapSource = Annotated[str | BitmapOfNode, Meta(title="BlockDirtyBitmapOrStr")]


class BlockDirtyBitmapAdd(Command, kw_only=True):
    """Make a bitmap that records the node's writes from now on.

    ``granularity``: bytes that one bit stands for, a power of two from 512 to 2 GiB; by default
    the node's cluster size within 4 KiB and 64 KiB, or 64 KiB. ``persistent``: kept when the
    daemon ends; no node here can do that yet. ``disabled``: it does not record until enabled.
    """

    command: ClassVar[str] = "block-dirty-bitmap-add"

    node: str
    name: str
    granularity: UInt32 | None = None
    persistent: bool = False
    disabled: bool = False


class BlockDirtyBitmapRemove(Command, kw_only=True):
    """Forget a bitmap."""

    command: ClassVar[str] = "block-dirty-bitmap-remove"

    node: str
    name: str


class BlockDirtyBitmapClear(Command, kw_only=True):
    """Mark everything as clean."""

    command: ClassVar[str] = "block-dirty-bitmap-clear"

    node: str
    name: str


class BlockDirtyBitmapEnable(Command, kw_only=True):
    """Record writes from now on."""

    command: ClassVar[str] = "block-dirty-bitmap-enable"

    node: str
    name: str


class BlockDirtyBitmapDisable(Command, kw_only=True):
    """Record no more writes."""

    command: ClassVar[str] = "block-dirty-bitmap-disable"

    node: str
    name: str


class BlockDirtyBitmapMerge(Command, kw_only=True):
    """Mark in ``target`` what is dirty in any of ``bitmaps``; all of them, or none."""

    command: ClassVar[str] = "block-dirty-bitmap-merge"

    node: str
    target: str
    bitmaps: list[BitmapSource]
