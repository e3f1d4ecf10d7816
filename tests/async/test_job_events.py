"""What clients see of a job, in order."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

import pytest
from trio.testing import MockClock

from blockd.job import JobError, OnError
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, scene

EIO = OSError(errno.EIO, "")
ENOSPC = OSError(errno.ENOSPC, "")
#: One chunk each 250 ms, so that a job waits for its speed nearly all the time.
SLOW = {"speed": 4 * CHUNK_BYTES}
MANUAL = {"auto_finalize": False, "auto_dismiss": False}

STARTED = "start: created, [start], running, paused, running, ok"
DONE = "[prepare], [commit], [close], COMPLETED 4/4, concluded"
ABORTED = "aborting, [abort], [close]"


@dataclass
class Case:
    """A job, commands by their times in seconds, and the story that comes of them."""

    name: str
    commands: list[tuple[float, str]]
    story: str
    plan: Plan = field(default_factory=Plan)
    options: dict[str, Any] = field(default_factory=dict)


#: These stories are qemu-storage-daemon's own, but for the hooks. Only, how far a job gets until an
#: answer or its cancellation depends there on how fast the copying is.
AS_THE_PEER = [
    Case("succeeds", [], f"{STARTED}, waiting, pending, {DONE}, null"),
    Case(
        "auto-finalize false",
        [(1, "finalize")],
        f"{STARTED}, waiting, pending, PENDING finalize: {DONE}, null, ok",
        options={"auto_finalize": False},
    ),
    Case(
        "auto-dismiss false",
        [(1, "dismiss")],
        f"{STARTED}, waiting, pending, {DONE} dismiss: null, ok",
        options={"auto_dismiss": False},
    ),
    Case(
        "auto-finalize and auto-dismiss false",
        [(1, "finalize"), (2, "dismiss")],
        f"{STARTED}, waiting, pending, PENDING finalize: {DONE}, ok dismiss: null, ok",
        options=MANUAL,
    ),
    Case(
        "cancelled while it waits for its speed",
        [(0.1, "cancel")],
        f"{STARTED} cancel: {ABORTED}, CANCELLED 1/4, concluded, null, ok",
        options=SLOW,
    ),
    Case(
        "cancelled, auto-dismiss false",
        [(0.1, "cancel"), (1, "dismiss")],
        f"{STARTED} cancel: {ABORTED}, CANCELLED 1/4, concluded, ok dismiss: null, ok",
        options=SLOW | {"auto_dismiss": False},
    ),
    Case(
        "cancelled while paused",
        [(0.1, "pause"), (1, "cancel")],
        f"{STARTED} pause: paused, ok "
        f"cancel: running, {ABORTED}, CANCELLED 1/4, concluded, null, ok",
        options=SLOW,
    ),
    Case(
        "cancelled while pending",
        [(1, "cancel")],
        f"{STARTED}, waiting, pending, PENDING "
        f"cancel: {ABORTED}, CANCELLED 4/4, concluded, null, ok",
        options={"auto_finalize": False},
    ),
    Case(
        "cancelled while pending, auto-dismiss false",
        [(1, "cancel"), (2, "dismiss")],
        f"{STARTED}, waiting, pending, PENDING "
        f"cancel: {ABORTED}, CANCELLED 4/4, concluded, ok dismiss: null, ok",
        options=MANUAL,
    ),
    Case(
        "cancelled while I/O is in flight, which has to end first",
        [(1, "cancel"), (3, "cancel"), (3, "pause"), (3, "set-speed 5")],
        f"{STARTED} cancel: ok cancel: ok pause: ok "
        f"set-speed 5: ok, {ABORTED}, CANCELLED 1/4, concluded, null",
        plan=Plan(chunk_seconds=9, stubborn=True),
    ),
    Case(
        "paused with I/O in flight, then cancelled",
        [(1, "pause"), (1, "cancel")],
        f"{STARTED} pause: ok cancel: ok, {ABORTED}, CANCELLED 1/4, concluded, null",
        plan=Plan(chunk_seconds=9, stubborn=True),
    ),
    Case(
        "paused while it waits for its speed",
        [(0.1, "pause"), (2, "resume")],
        f"{STARTED} pause: paused, ok resume: running, ok, waiting, pending, {DONE}, null",
        options=SLOW,
    ),
    Case(
        "paused while I/O is in flight",
        [(0.1, "pause"), (2, "resume")],
        f"{STARTED} pause: ok, paused resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(chunk_seconds=0.4),
    ),
    Case(
        "resumed before the pause was complete",
        [(0.1, "pause"), (0.2, "resume")],
        f"{STARTED} pause: ok resume: ok, waiting, pending, {DONE}, null",
        plan=Plan(chunk_seconds=0.4),
    ),
    Case(
        "on-error report",
        [],
        f"{STARTED}, ERROR write report, {ABORTED}, COMPLETED 2/4 Input/output error, "
        "concluded, null",
        plan=Plan(errors={2: EIO}),
    ),
    Case(
        "on-error report, auto-finalize and auto-dismiss false",
        [(1, "dismiss")],
        f"{STARTED}, ERROR write report, {ABORTED}, COMPLETED 2/4 No space left on device, "
        "concluded dismiss: null, ok",
        plan=Plan(errors={2: ENOSPC}),
        options=MANUAL,
    ),
    Case(
        "on-error ignore",
        [],
        f"{STARTED}, ERROR write ignore, waiting, pending, {DONE}, null",
        plan=Plan(errors={2: EIO}, policy=OnError.IGNORE),
    ),
    Case(
        "on-error stop",
        [(1, "pause"), (2, "resume")],
        f"{STARTED}, ERROR write stop, paused pause: REFUSED Job is already paused "
        f"resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(errors={2: EIO}, policy=OnError.STOP),
    ),
    Case(
        "on-error stop, then cancelled",
        [(1, "cancel")],
        f"{STARTED}, ERROR write stop, paused "
        f"cancel: running, {ABORTED}, CANCELLED 2/4, concluded, null, ok",
        plan=Plan(errors={2: EIO}, policy=OnError.STOP),
    ),
    Case(
        "on-error auto, target full",
        [(1, "resume")],
        f"{STARTED}, ERROR write stop, paused resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(errors={2: ENOSPC}, policy=OnError.AUTO),
    ),
    Case(
        "on-error auto, target broken",
        [],
        f"{STARTED}, ERROR write report, {ABORTED}, COMPLETED 2/4 Input/output error, "
        "concluded, null",
        plan=Plan(errors={2: EIO}, policy=OnError.AUTO),
    ),
    Case(
        "refusals while running",
        [
            (0.1, "resume"),
            (0.1, "complete"),
            (0.1, "finalize"),
            (0.1, "dismiss"),
            (0.1, "set-speed -1"),
            (0.1, "cancel"),
        ],
        f"{STARTED} resume: REFUSED Can't resume a job that was not paused "
        "complete: REFUSED Job 'j' in state 'running' cannot accept command verb 'complete' "
        "finalize: REFUSED Job 'j' in state 'running' cannot accept command verb 'finalize' "
        "dismiss: REFUSED Job 'j' in state 'running' cannot accept command verb 'dismiss' "
        "set-speed -1: REFUSED Parameter 'speed' expects a non-negative value "
        f"cancel: {ABORTED}, CANCELLED 1/4, concluded, null, ok",
        options=SLOW,
    ),
    Case(
        "refusals while paused",
        [
            (0.1, "pause"),
            (0.2, "pause"),
            (0.2, "complete"),
            (0.2, "finalize"),
            (0.2, "dismiss"),
            (0.2, "set-speed -1"),
            (0.2, "set-speed 0"),
            (0.3, "resume"),
        ],
        f"{STARTED} pause: paused, ok pause: REFUSED Job is already paused "
        "complete: REFUSED Job 'j' in state 'paused' cannot accept command verb 'complete' "
        "finalize: REFUSED Job 'j' in state 'paused' cannot accept command verb 'finalize' "
        "dismiss: REFUSED Job 'j' in state 'paused' cannot accept command verb 'dismiss' "
        "set-speed -1: REFUSED Parameter 'speed' expects a non-negative value "
        f"set-speed 0: ok resume: running, ok, waiting, pending, {DONE}, null",
        options=SLOW,
    ),
    Case(
        "refusals while pending",
        [(1, "pause"), (1, "resume"), (1, "complete"), (1, "dismiss"), (1, "set-speed 1")],
        f"{STARTED}, waiting, pending, PENDING "
        "pause: REFUSED Job 'j' in state 'pending' cannot accept command verb 'pause' "
        "resume: REFUSED Can't resume a job that was not paused "
        "complete: REFUSED Job 'j' in state 'pending' cannot accept command verb 'complete' "
        "dismiss: REFUSED Job 'j' in state 'pending' cannot accept command verb 'dismiss' "
        "set-speed 1: REFUSED Job 'j' in state 'pending' cannot accept command verb 'set-speed'",
        options={"auto_finalize": False},
    ),
    Case(
        "refusals when concluded",
        [
            (1, "cancel"),
            (1, "pause"),
            (1, "resume"),
            (1, "complete"),
            (1, "finalize"),
            (1, "set-speed -1"),
        ],
        f"{STARTED}, waiting, pending, {DONE} "
        "cancel: REFUSED Job 'j' in state 'concluded' cannot accept command verb 'cancel' "
        "pause: REFUSED Job 'j' in state 'concluded' cannot accept command verb 'pause' "
        "resume: REFUSED Can't resume a job that was not paused "
        "complete: REFUSED Job 'j' in state 'concluded' cannot accept command verb 'complete' "
        "finalize: REFUSED Job 'j' in state 'concluded' cannot accept command verb 'finalize' "
        "set-speed -1: REFUSED Job 'j' in state 'concluded' cannot accept command verb "
        "'set-speed'",
        options={"auto_dismiss": False},
    ),
]

#: What the peer's backups can't show: it has no failing end, and its jobs have one task.
OURS = [
    Case(
        "paused in its last I/O",
        [(0.7, "pause"), (2, "resume")],
        f"{STARTED} pause: ok, paused resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(chunk_seconds=0.2),
    ),
    Case(
        "on-error stop while other I/O is in flight",
        [(2, "resume")],
        f"{STARTED}, ERROR write stop, paused resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(errors={0: EIO}, policy=OnError.STOP, workers=3, chunk_seconds=0.4),
    ),
    Case(
        "an error in two tasks at once",
        [(2, "resume")],
        f"{STARTED}, ERROR write stop, ERROR write stop, paused "
        f"resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(errors={0: EIO, 1: EIO}, policy=OnError.STOP, workers=2, chunk_seconds=0.4),
    ),
    Case(
        "paused, then stopped by an error",
        [(0.1, "pause"), (2, "resume")],
        f"{STARTED} pause: ok, ERROR write stop, paused "
        f"resume: running, ok, waiting, pending, {DONE}, null",
        plan=Plan(errors={0: EIO}, policy=OnError.STOP, chunk_seconds=0.4),
    ),
    Case(
        "fails while a pause is under way",
        [(0.1, "pause")],
        f"{STARTED} pause: ok, ERROR write report, paused, running, {ABORTED}, "
        "COMPLETED 0/4 Input/output error, concluded, null",
        plan=Plan(errors={0: EIO}, chunk_seconds=0.4),
    ),
    Case(
        "cancelled during prepare",
        [(1, "cancel")],
        f"{STARTED}, waiting, pending cancel: {ABORTED}, CANCELLED 4/4, concluded, null, ok",
        plan=Plan(hook_seconds={"prepare": 5}),
    ),
    Case(
        "cancelled during commit",
        [(1, "cancel")],
        f"{STARTED}, waiting, pending, [prepare] "
        "cancel: REFUSED Job 'j' in state 'pending' cannot accept command verb 'cancel', "
        "[commit], [close], COMPLETED 4/4, concluded, null",
        plan=Plan(hook_seconds={"commit": 5}),
    ),
    Case(
        "finalized twice",
        [(1, "finalize"), (1, "finalize")],
        f"{STARTED}, waiting, pending, PENDING finalize: {DONE}, ok "
        "finalize: REFUSED Job 'j' in state 'concluded' cannot accept command verb 'finalize'",
        options=MANUAL,
        plan=Plan(hook_seconds={"prepare": 2}),
    ),
    Case(
        "prepare fails",
        [],
        f"{STARTED}, waiting, pending, [prepare], {ABORTED}, "
        "COMPLETED 4/4 Input/output error, concluded, null",
        plan=Plan(errors={"prepare": EIO}),
    ),
    Case(
        "prepare fails at job-finalize",
        [(1, "finalize"), (2, "dismiss")],
        f"{STARTED}, waiting, pending, PENDING finalize: [prepare], {ABORTED}, "
        "COMPLETED 4/4 the target is gone, concluded, ok dismiss: null, ok",
        plan=Plan(errors={"prepare": JobError("the target is gone")}),
        options=MANUAL,
    ),
    Case(
        "commit fails",
        [],
        f"{STARTED}, waiting, pending, [prepare], [commit], {ABORTED}, "
        "COMPLETED 4/4 Input/output error, concluded, null",
        plan=Plan(errors={"commit": EIO}),
    ),
    Case(
        "commit takes too long",
        [],
        f"{STARTED}, waiting, pending, [prepare], {ABORTED}, "
        "COMPLETED 4/4 not done within 30 seconds, concluded, null",
        plan=Plan(hook_seconds={"commit": 1000}),
    ),
    Case(
        "abort and close take too long",
        [(0.1, "cancel")],
        f"{STARTED} cancel: aborting, ok, CANCELLED 1/4, concluded, null",
        plan=Plan(hook_seconds={"abort": 1000, "close": 1000}),
        options=SLOW,
    ),
    Case(
        "abort and close fail",
        [(0.1, "cancel")],
        f"{STARTED} cancel: {ABORTED}, CANCELLED 1/4, concluded, null, ok",
        plan=Plan(errors={"abort": EIO, "close": KeyError("bug")}),
        options=SLOW,
    ),
    Case(
        "a bug in run",
        [],
        f"{STARTED}, {ABORTED}, COMPLETED 0/4 Internal error: KeyError('bug'), concluded, null",
        plan=Plan(errors={"run": KeyError("bug")}),
    ),
    Case(
        "a bug in a task of run, beside an error",
        [],
        f"{STARTED}, ERROR write report, {ABORTED}, "
        "COMPLETED 0/4 Internal error: KeyError('bug'), concluded, null",
        plan=Plan(errors={0: EIO, 1: KeyError("bug")}, workers=2, chunk_seconds=1, stubborn=True),
    ),
    Case(
        "a bug in commit",
        [],
        f"{STARTED}, waiting, pending, [prepare], [commit], {ABORTED}, "
        "COMPLETED 4/4 Internal error: KeyError('bug'), concluded, null",
        plan=Plan(errors={"commit": KeyError("bug")}),
    ),
]


@pytest.mark.parametrize("case", AS_THE_PEER + OURS, ids=lambda case: case.name)
async def test_the_story_of_a_job(case: Case, autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, case.plan, **case.options)
        story = await on.play(job, case.commands)
    assert story == case.story
