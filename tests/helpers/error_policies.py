"""What a backup does about an error that passes: one table, for ours and for the peer."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from blockd.job import OnError

EIO, ENOSPC = errno.EIO, errno.ENOSPC

#: The error, the policy (``on-source-error`` or ``on-target-error``), and the action.
POLICIES = [
    (EIO, OnError.REPORT, "report"),
    (EIO, OnError.IGNORE, "ignore"),
    (EIO, OnError.STOP, "stop"),
    (EIO, OnError.ENOSPC, "report"),
    (EIO, OnError.AUTO, "report"),
    (ENOSPC, OnError.REPORT, "report"),
    (ENOSPC, OnError.IGNORE, "ignore"),
    (ENOSPC, OnError.STOP, "stop"),
    (ENOSPC, OnError.ENOSPC, "stop"),
    (ENOSPC, OnError.AUTO, "stop"),
]

#: The job's ``io-status`` while it is stopped.
IO_STATUS = {EIO: "failed", ENOSPC: "nospace"}

ENDED_WELL = ["waiting", "pending", None, "concluded", "null"]


def events_of(operation: str, number: int, action: str) -> list[Any]:
    """What clients see (``told``) of a job from its error on; one that stops is resumed."""
    error = (operation, action)
    if action == "report":
        return [error, "aborting", os.strerror(number), "concluded", "null"]
    return [error, *(["paused", "running"] if action == "stop" else []), *ENDED_WELL]


def told(events: Iterable[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Events (name, data) in short: an error with its action, a status, the error of the end."""
    short: list[Any] = []
    for name, data in events:
        if name == "BLOCK_JOB_ERROR":
            short.append((data["operation"], data["action"]))
        elif name == "JOB_STATUS_CHANGE":
            short.append(data["status"])
        else:
            short.append(data.get("error"))
    return short
