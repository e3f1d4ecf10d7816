"""Jobs that end together: what clients see of them, and which hooks run."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from blockd.job import JobError
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, Scene, scene

EIO = OSError(errno.EIO, "")
#: One chunk a second.
SLOW: dict[str, Any] = {"speed": CHUNK_BYTES}
MANUAL: dict[str, Any] = {"auto_finalize": False}

STARTED = (
    "start: created, [start], k created, k [start], "
    "k running, k paused, running, paused, k running, running, ok"
)
K_DONE = "k [close], k COMPLETED 4/4, k concluded, k null"
J_DONE = "[close], COMPLETED 4/4, concluded, null"
COMMITTED = f"k [commit], [commit], {K_DONE}, {J_DONE}"
BOTH_PENDING = "k pending, k PENDING, pending"


@dataclass
class Case:
    """Jobs ``j`` and ``k``, the newer one, commands to them, and the story that comes of it."""

    name: str
    story: str
    j: Plan = field(default_factory=Plan)
    k: Plan = field(default_factory=Plan)
    j_options: dict[str, Any] = field(default_factory=dict)
    k_options: dict[str, Any] = field(default_factory=dict)
    commands: list[tuple[float, str, str]] = field(default_factory=list)


def gone(*, k: str, j: str) -> str:
    """How both end in turn; each is what comes between ``close`` and its conclusion."""
    return (
        f"k [abort], k [close], k {k}, k concluded, k null, "
        f"aborting, [abort], [close], {j}, concluded, null"
    )


CASES = [
    Case(
        "both succeed, and the one waits for the other",
        f"{STARTED}, waiting, k waiting, k pending, pending, [prepare], k [prepare], {COMMITTED}",
        k=Plan(chunk_seconds=1, hook_seconds={"prepare": 1}),
    ),
    Case(
        "one is to be finalized, by the other",
        f"{STARTED}, waiting, k waiting, {BOTH_PENDING} "
        f"finalize: [prepare], k [prepare], {COMMITTED}, ok",
        k=Plan(chunk_seconds=1, hook_seconds={"prepare": 1}),
        k_options=MANUAL,
        commands=[(9, "finalize", "j")],
    ),
    Case(
        "one fails while the other waits",
        f"{STARTED}, waiting, k ERROR write report, k aborting, "
        + gone(k="COMPLETED 2/4 Input/output error", j="CANCELLED 4/4"),
        k=Plan(chunk_seconds=1, errors={2: EIO}),
    ),
    Case(
        "one fails while the other is paused",
        f"{STARTED} pause: paused, ok, k ERROR write report, k aborting, running, aborting, "
        "k [abort], k [close], k COMPLETED 2/4 Input/output error, k concluded, k null, "
        "[abort], [close], CANCELLED 1/4, concluded, null",
        k=Plan(chunk_seconds=1, errors={2: EIO}),
        j_options=SLOW,
        commands=[(0.5, "pause", "j")],
    ),
    Case(
        "one fails to prepare when the other has",
        f"{STARTED}, waiting, k waiting, k pending, pending, [prepare], k [prepare], k aborting, "
        + gone(k="COMPLETED 4/4 it is gone", j="CANCELLED 4/4"),
        k=Plan(
            chunk_seconds=1, errors={"prepare": JobError("it is gone")}, hook_seconds={"prepare": 1}
        ),
    ),
    Case(
        "one fails to prepare while the other does",
        f"{STARTED}, waiting, k waiting, k pending, pending, k [prepare], k aborting, "
        + gone(k="COMPLETED 4/4 it is gone", j="CANCELLED 4/4"),
        j=Plan(hook_seconds={"prepare": 5}),
        k=Plan(chunk_seconds=1, errors={"prepare": JobError("it is gone")}),
    ),
    Case(
        "the instant of the commit can't be had",
        f"{STARTED}, waiting, k waiting, k pending, pending, [prepare], k [prepare], k aborting, "
        + gone(
            k="COMPLETED 4/4 not done within 30 seconds",
            j="COMPLETED 4/4 not done within 30 seconds",
        ),
        j=Plan(hook_seconds={"commit": 1000}),
        k=Plan(chunk_seconds=1, hook_seconds={"prepare": 1}),
    ),
    Case(
        "cancelled by the one that waits",
        f"{STARTED}, waiting cancel: k aborting, "
        + gone(k="CANCELLED 2/4", j="CANCELLED 4/4")
        + ", ok",
        k_options=SLOW,
        commands=[(1.5, "cancel", "j")],
    ),
    Case(
        "cancelled by the one that runs",
        f"{STARTED}, waiting cancel: k aborting, "
        + gone(k="CANCELLED 2/4", j="CANCELLED 4/4")
        + ", ok",
        k_options=SLOW,
        commands=[(1.5, "cancel", "k")],
    ),
    Case(
        "cancelled while pending",
        f"{STARTED}, waiting, k waiting, {BOTH_PENDING} cancel: k aborting, "
        + gone(k="CANCELLED 4/4", j="CANCELLED 4/4")
        + ", ok",
        k=Plan(chunk_seconds=1),
        k_options=MANUAL,
        commands=[(9, "cancel", "j")],
    ),
    Case(
        "cancelled during the commit",
        f"{STARTED}, waiting, k waiting, k pending, pending, [prepare], k [prepare] "
        "cancel: REFUSED Job 'j' in state 'pending' cannot accept command verb 'cancel', "
        f"{COMMITTED}",
        j=Plan(hook_seconds={"commit": 5}),
        k=Plan(chunk_seconds=1, hook_seconds={"prepare": 1}),
        commands=[(7, "cancel", "j")],
    ),
    Case(
        "an I/O that hangs keeps both from their end, but not the reply",
        f"{STARTED}, waiting cancel: ok, k aborting, " + gone(k="CANCELLED 1/4", j="CANCELLED 4/4"),
        k=Plan(chunk_seconds=60, stubborn=True),
        commands=[(1, "cancel", "j")],
    ),
    Case(
        "verbs to the one that waits",
        f"{STARTED}, waiting "
        "pause: REFUSED Job 'j' in state 'waiting' cannot accept command verb 'pause' "
        "finalize: REFUSED Job 'j' in state 'waiting' cannot accept command verb 'finalize', "
        f"k waiting, k pending, pending, [prepare], k [prepare], {COMMITTED}",
        k=Plan(chunk_seconds=1, hook_seconds={"prepare": 1}),
        commands=[(1, "pause", "j"), (1, "finalize", "j")],
    ),
]


async def play(on: Scene, case: Case) -> str:
    begin = trio.current_time()
    await on.start(
        FakeJob(on.story, case.j, **case.j_options),
        FakeJob(on.story, case.k, "k", **case.k_options),
    )
    for seconds, command, job in case.commands:
        await trio.sleep_until(begin + seconds)
        await on.do(command, job)
    await trio.sleep(200)
    assert on.jobs.newest_first() == []
    return " ".join(on.story.lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_the_story_of_a_group(case: Case, autojump_clock: MockClock) -> None:
    async with scene() as on:
        assert await play(on, case) == case.story


async def test_a_refused_one_takes_the_others_along() -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story), FakeJob(on.story, job_id="k"), FakeJob(on.story))
        assert on.jobs.newest_first() == []
    assert on.story.lines == [
        "start: created, [start], k created, k [start], k [revoke], [revoke], [close], "
        "k aborting, k [close], k concluded, k null, aborting, [close], concluded, null, "
        "REFUSED Job ID 'j' already in use"
    ]


async def test_the_end_of_everything(autojump_clock: MockClock) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, **SLOW), FakeJob(on.story, job_id="k", **SLOW))
        await trio.sleep(1.5)
        on.story.command("exit")
    assert on.jobs.newest_first() == []
    assert on.story.lines[1:] == [
        "exit: k aborting, aborting, k [abort], k [close], k CANCELLED 2/4, k concluded, k null, "
        "[abort], [close], CANCELLED 2/4, concluded, null"
    ]


async def test_a_rehearsal_is_heard_by_nobody() -> None:
    async with scene() as on:
        on.story.command("start")
        rehearsal = on.jobs.rehearsal()
        job = FakeJob(on.story)
        rehearsal.admit(job)
        assert rehearsal.newest_first() == [job]
        assert on.jobs.newest_first() == []
        job.revoke()
        await job.give_up()
    assert on.story.lines == ["start: [start], [revoke], [close]"]
