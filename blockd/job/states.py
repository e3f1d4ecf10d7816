"""What a job's state may become and which commands each state accepts: two tables.

The names are QMP's, and the tables are QEMU's; nothing else in the package decides about a state.
"""

from __future__ import annotations

import errno as errnos
from enum import StrEnum


class Status(StrEnum):
    """Where a job is in its life."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(StrEnum):
    """What a command asks of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


NEXT: dict[Status, frozenset[Status]] = {
    Status.UNDEFINED: frozenset({Status.CREATED}),
    Status.CREATED: frozenset({Status.RUNNING, Status.ABORTING, Status.NULL}),
    Status.RUNNING: frozenset({Status.PAUSED, Status.READY, Status.WAITING, Status.ABORTING}),
    Status.PAUSED: frozenset({Status.RUNNING}),
    Status.READY: frozenset({Status.STANDBY, Status.WAITING, Status.ABORTING}),
    Status.STANDBY: frozenset({Status.READY}),
    Status.WAITING: frozenset({Status.PENDING, Status.ABORTING}),
    Status.PENDING: frozenset({Status.ABORTING, Status.CONCLUDED}),
    Status.ABORTING: frozenset({Status.CONCLUDED}),
    Status.CONCLUDED: frozenset({Status.NULL}),
    Status.NULL: frozenset(),
}

_ACTIVE = frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.READY, Status.STANDBY})

MAY: dict[Verb, frozenset[Status]] = {
    Verb.CANCEL: _ACTIVE | {Status.WAITING, Status.PENDING},
    Verb.PAUSE: _ACTIVE,
    Verb.RESUME: _ACTIVE,
    Verb.SET_SPEED: _ACTIVE,
    Verb.CHANGE: _ACTIVE,
    Verb.COMPLETE: frozenset({Status.READY, Status.STANDBY}),
    Verb.FINALIZE: frozenset({Status.PENDING}),
    Verb.DISMISS: frozenset({Status.CONCLUDED}),
}


class IoStatus(StrEnum):
    """Why a job stopped on an error, until it is resumed."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class OnError(StrEnum):
    """What the user wants to happen at an I/O error (``on-source-error``, ``on-target-error``)."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"
    ENOSPC = "enospc"
    AUTO = "auto"


class ErrorAction(StrEnum):
    """What does happen at an I/O error."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


def action_on_error(policy: OnError, errno: int) -> ErrorAction:
    """``enospc`` and ``auto`` stop a job whose target is full and report everything else."""
    if policy in (OnError.ENOSPC, OnError.AUTO):
        return ErrorAction.STOP if errno == errnos.ENOSPC else ErrorAction.REPORT
    return ErrorAction(policy.value)
