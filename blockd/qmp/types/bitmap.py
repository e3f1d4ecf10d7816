"""Dirty bitmaps. Where nothing else is said, a command answers nothing (``{}``)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from blockd.qmp.types.base import Command, Int64, Object, Query, UInt32, UInt64


class BitmapOfNode(Object, kw_only=True):
    """A bitmap of any node."""

    node: str
    name: str


#: A bitmap by name, on the node in question, or of another node.
BitmapSource = Annotated[str | BitmapOfNode, Meta(title="BlockDirtyBitmapOrStr")]


class BlockDirtyBitmapAdd(Command, kw_only=True):
    """Make a bitmap that records the node's writes from now on.

    ``granularity``: bytes that one bit stands for, a power of two from 512 to 2 GiB; by default
    the node's cluster size within 4 KiB and 64 KiB, or 64 KiB. ``persistent``: it outlives
    blockd, in its state directory, and is stored in a qcow2 image when the node is closed.
    ``disabled``: it does not record until enabled.
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


class XDebugBlockDirtyBitmapSha256(Query, kw_only=True):
    """For debugging: the SHA-256, in hex, of a bitmap's bits, as ``{"sha256": DIGEST}``.

    They are hashed as an array of little-endian 64-bit words, the lowest granule first, so the
    answer takes time in proportion to the node's size. While a job uses the bitmap, they are
    those that the bitmap had at the job's start.
    """

    command: ClassVar[str] = "x-debug-block-dirty-bitmap-sha256"

    node: str
    name: str


class XBlockdAudit(Command, kw_only=True):
    """Compare what a bitmap calls clean on a node with ``target``, its last backup.

    QEMU has no such command. It is a job, to be dismissed when it has concluded. Where a clean
    granule differs the job fails, everything is dirty from then on, and the event
    BLOCK_DIRTY_BITMAP_RECOVERED tells it. ``target``: a node of the same size. ``sample``: look at
    so many bytes only, at least 1, in random places. ``speed``: bytes per second, 0 for no limit.
    """

    command: ClassVar[str] = "x-blockd-audit"

    job_id: str
    node: str
    bitmap: str
    target: str
    sample: UInt64 | None = None
    speed: Int64 = 0
