"""What administrators hear of the state directory: events, and lines in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from blockd.bitmap import DirtyBitmap
from blockd.block import Node, tell_recovered
from blockd.events import Bus

_log = logging.getLogger(__name__)


class StateEvents:
    """The ``Listener`` of the daemon's state directory."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def bitmap_recovered(self, node: Node, bitmap: DirtyBitmap) -> None:
        assert bitmap.reason is not None, "it came back other than it was"
        tell_recovered(self._bus, node.name, bitmap, bitmap.reason)

    def storing_failed(self, node: Node, reason: str) -> None:
        _log.error("after a crash, node '%s' would lose its bitmaps: %s", node.name, reason)
        self._bus.publish("BLOCK_DIRTY_BITMAPS_UNSAFE", {"node-name": node.name, "error": reason})

    def storing_resumed(self, node: Node) -> None:
        _log.warning("the bitmaps of node '%s' are safe again", node.name)
        self._bus.publish("BLOCK_DIRTY_BITMAPS_SAFE", {"node-name": node.name})


def tell_of_unfinished(jobs: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Log what became of the backups of a daemon that did not end in order."""
    for job_id, facts in jobs:
        if not facts:
            _log.warning("job '%s' did not end when blockd did; its record is damaged", job_id)
            continue
        backup = f"backup '{job_id}' of node '{facts['node']}' to '{facts['target']}'"
        rest = "; its target is incomplete"
        if "bitmap" in facts:
            rest += f", and bitmap '{facts['bitmap']}' has all that it had, and what came after"
        if "lost-bitmap" in facts:
            lost = facts["lost-bitmap"]
            rest += f", and bitmap '{lost}' was not kept, so do a full backup"
        _log.warning("%s (sync %s) did not end when blockd did%s", backup, facts["sync"], rest)
