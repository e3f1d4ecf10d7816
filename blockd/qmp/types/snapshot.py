"""Overlays put on live nodes."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Command


class BlockdevSnapshot(Command, kw_only=True):
    """Put ``overlay`` on ``node``, which keeps what it has now: guests write to the overlay.

    ``overlay``: a node whose driver can have a backing file, and that has none. Exports of
    ``node``, also with clients connected, and the nodes above it go on with the overlay; jobs and
    bitmaps stay with ``node``, which becomes read-only.
    """

    command: ClassVar[str] = "blockdev-snapshot"

    node: str
    overlay: str


class BlockdevSnapshotSync(Command, kw_only=True):
    """Put an overlay in a file on a node, as ``blockdev-snapshot`` does it.

    ``snapshot-node-name``: what the overlay is to be called. It goes when nobody uses it any more.
    ``mode``: make the overlay, an image of the node's size in whatever the file was before; or
    open one that is there, whatever its header says of a backing file. ``device``: not of use
    here, as there are no devices.
    """

    command: ClassVar[str] = "blockdev-snapshot-sync"

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
