"""Overlays put on live nodes."""

from __future__ import annotations

from typing import ClassVar

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
