"""What administrators hear of a bitmap that is not what it was."""

from __future__ import annotations

import logging

from blockd.bitmap import DirtyBitmap, Reason
from blockd.events import Bus

log = logging.getLogger(__name__)


def tell_recovered(bus: Bus, node_name: str, bitmap: DirtyBitmap, reason: Reason) -> None:
    """Tell it in an event, and in the log, which names the way out too."""
    if bitmap.inconsistent:
        what, way_out = "inconsistent", "remove it, and do a full backup with a new one"
    else:
        what, way_out = "all dirty", "the next backup with it copies everything"
        if reason is Reason.SIZE_CHANGED:
            way_out += ", to a target of the new size"
    log.warning(
        "bitmap '%s' of node '%s' is %s: %s; %s",
        bitmap.name,
        node_name,
        what,
        reason.value,
        way_out,
    )
    event = {"node-name": node_name, "name": bitmap.name, "reason": reason.value}
    bus.publish("BLOCK_DIRTY_BITMAP_RECOVERED", event | {"inconsistent": bitmap.inconsistent})
