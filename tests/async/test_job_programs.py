"""Any commands at any time to any job: it always ends, and always in order."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import NamedTuple

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from blockd.errors import BlockdError
from blockd.job import OnError
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, Scene, scene

HOOKS = ("start", "run", "prepare", "commit", "abort", "close")
COMMANDS = (
    "pause",
    "resume",
    "cancel",
    "finalize",
    "dismiss",
    "complete",
    "set-speed 0",
    f"set-speed {CHUNK_BYTES}",
)
TIMES = st.sampled_from((0.0, 0.1, 0.5, 1.0, 3.0))
ERRORS = st.sampled_from((OSError(errno.EIO, ""), OSError(errno.ENOSPC, ""), KeyError("bug")))

PLANS = st.builds(
    Plan,
    chunks=st.integers(0, 5),
    workers=st.integers(1, 3),
    chunk_seconds=TIMES,
    stubborn=st.booleans(),
    policy=st.sampled_from(OnError),
    errors=st.dictionaries(st.sampled_from((*HOOKS, 0, 1, 2)), ERRORS, max_size=3),
    hook_seconds=st.dictionaries(st.sampled_from(HOOKS[1:]), TIMES, max_size=3),
)


class Options(NamedTuple):
    """What a client says when it starts the job."""

    speed: int
    auto_finalize: bool
    auto_dismiss: bool


OPTIONS = st.builds(
    Options, st.sampled_from((0, CHUNK_BYTES, 4 * CHUNK_BYTES)), st.booleans(), st.booleans()
)


async def command_at(on: Scene, seconds: float, command: str) -> None:
    await trio.sleep(seconds)
    if on.jobs.newest_first():
        await on.do(command)


async def start(on: Scene, job: FakeJob) -> None:
    with suppress(BlockdError, OSError, KeyError):
        await on.begin(job)


async def quit_at(on: Scene, seconds: float) -> None:
    await trio.sleep(seconds)
    await on.jobs.cancel_all(1000)


async def told(plan: Plan, options: Options, commands: list[tuple[float, str]]) -> list[str]:
    """What happens to a job that gets commands from several clients, and at last a quit."""
    async with scene() as on:
        job = FakeJob(on.story, plan, **options._asdict())
        on.story.command("begin")
        async with trio.open_nursery() as clients:
            clients.start_soon(start, on, job)
            for seconds, command in commands:
                clients.start_soon(command_at, on, seconds, command)
            clients.start_soon(quit_at, on, 20)
        assert on.jobs.newest_first() == []
        assert not job.busy
        await job.wait_concluded()
    return on.story.told


@given(PLANS, OPTIONS, st.lists(st.tuples(TIMES, st.sampled_from(COMMANDS)), max_size=6))
def test_every_job_ends_in_order(
    plan: Plan, options: Options, commands: list[tuple[float, str]]
) -> None:
    """A move that the table lacks would end the program with an AssertionError."""
    clock = MockClock(autojump_threshold=0)
    story = trio.run(told, plan, options, commands, clock=clock)
    for once in ("created", "[close]", "concluded", "null"):
        assert story.count(once) == 1
    assert story.index("[close]") < story.index("concluded") < story.index("null")
    ends = [what for what in story if what.startswith(("COMPLETED", "CANCELLED"))]
    assert len(ends) == ("running" in story)
    assert ("[abort]" in story) == ("running" in story and "aborting" in story)
    assert "aborting" in story or "[commit]" in story
