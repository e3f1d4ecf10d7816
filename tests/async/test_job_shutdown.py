"""The end of the daemon: every job aborts or finishes, whatever it is in the middle of."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from blockd.events import Bus, Event
from blockd.job import Jobs, OnError
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, Scene, scene

EIO = OSError(errno.EIO, "")
SLOW = CHUNK_BYTES
ABORTED = "aborting, [abort], [close], CANCELLED"


def slow(on: Scene) -> FakeJob:
    return FakeJob(on.story, speed=SLOW)


def stopped(on: Scene) -> FakeJob:
    return FakeJob(on.story, Plan(errors={0: EIO}, policy=OnError.STOP))


def pending(on: Scene) -> FakeJob:
    return FakeJob(on.story, auto_finalize=False)


def preparing(on: Scene) -> FakeJob:
    return FakeJob(on.story, Plan(hook_seconds={"prepare": 5}))


def committing(on: Scene) -> FakeJob:
    return FakeJob(on.story, Plan(hook_seconds={"commit": 5}))


def aborting(on: Scene) -> FakeJob:
    return FakeJob(on.story, Plan(errors={"prepare": EIO}, hook_seconds={"abort": 5}))


def in_flight(on: Scene) -> FakeJob:
    return FakeJob(on.story, Plan(chunk_seconds=5, stubborn=True))


COMMITTED = "[commit], [close], COMPLETED 4/4, concluded, null"
FAILED = "[abort], [close], COMPLETED 4/4 Input/output error, concluded, null"
ENDS = [
    (slow, f"{ABORTED} 1/4, concluded, null"),
    (stopped, f"running, {ABORTED} 0/4, concluded, null"),
    (pending, f"{ABORTED} 4/4, concluded, null"),
    (preparing, f"{ABORTED} 4/4, concluded, null"),
    (committing, COMMITTED),
    (aborting, FAILED),
    (in_flight, f"{ABORTED} 1/4, concluded, null"),
]
each_end = pytest.mark.parametrize(("make", "story"), ENDS, ids=[make.__name__ for make, _ in ENDS])


@each_end
async def test_cancel_all(
    make: Callable[[Scene], FakeJob], story: str, autojump_clock: MockClock
) -> None:
    async with scene() as on:
        await on.start(make(on))
        await trio.sleep(1)
        await on.command("quit", lambda: on.jobs.cancel_all(10))
        assert on.jobs.newest_first() == []
    assert on.story.lines[1:] == [f"quit: {story}, ok"]


@each_end
async def test_the_nursery_is_cancelled(
    make: Callable[[Scene], FakeJob], story: str, autojump_clock: MockClock
) -> None:
    async with scene() as on:
        await on.start(make(on))
        await trio.sleep(1)
        on.story.command("exit")
    assert on.jobs.newest_first() == []
    assert on.story.lines[1:] == [f"exit: {story}"]


@pytest.mark.parametrize("error", [EIO, KeyError("bug")], ids=["error", "bug"])
async def test_a_failure_beside_the_cancellation_of_everything(
    error: Exception, autojump_clock: MockClock
) -> None:
    """One task fails, the other is cancelled: what the first raised ends with the job."""
    async with scene() as on:
        plan = Plan(workers=2, chunk_seconds=5, stubborn=True, errors={0: error})
        await on.start(FakeJob(on.story, plan))
        await trio.sleep(1)
        on.story.command("exit")
    assert on.jobs.newest_first() == []
    assert on.story.lines[-1].endswith(f"{ABORTED} 1/4, concluded, null")


async def test_cancel_all_dismisses_what_has_concluded(autojump_clock: MockClock) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, auto_dismiss=False))
        await trio.sleep(1)
        await on.command("quit", lambda: on.jobs.cancel_all(10))
        assert on.jobs.newest_first() == []
    assert on.story.lines[1:] == ["quit: null, ok"]


async def test_cancel_all_dismisses_what_it_has_cancelled(autojump_clock: MockClock) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, speed=SLOW, auto_dismiss=False))
        await trio.sleep(1)
        await on.command("quit", lambda: on.jobs.cancel_all(10))
    assert on.story.lines[1:] == [f"quit: {ABORTED} 1/4, concluded, null, ok"]


async def test_cancel_all_takes_as_long_as_the_slowest_job(autojump_clock: MockClock) -> None:
    async with scene() as on:
        begin = trio.current_time()
        for job_id in ("a", "b", "c"):
            plan = Plan(chunk_seconds=5, stubborn=True)
            await on.start(FakeJob(on.story, plan, job_id))
        await trio.sleep(1)
        await on.jobs.cancel_all(10)
        assert trio.current_time() - begin == 5
        assert on.jobs.newest_first() == []


async def test_cancel_all_gives_up_at_its_deadline(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, Plan(chunk_seconds=100, stubborn=True)))
        await trio.sleep(1)
        begin = trio.current_time()
        await on.jobs.cancel_all(10)
        assert trio.current_time() - begin == 10
        assert "jobs not ended within 10 seconds: ['j']" in caplog.text


async def test_a_bug_in_a_job_is_logged_and_disturbs_nobody(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene() as on:
        other = FakeJob(on.story, job_id="other", speed=SLOW)
        await on.start(other)
        await on.play(FakeJob(on.story, Plan(errors={"run": KeyError("bug")})))
        assert other.current_progress == other.total_progress
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "job 'j' failed unexpectedly"
    assert "KeyError: 'bug'" in caplog.text


async def test_an_expected_failure_is_not_logged_as_a_bug(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene() as on:
        await on.play(FakeJob(on.story, Plan(errors={1: EIO})))
    assert caplog.records == []


async def test_a_move_outside_the_table_is_a_bug() -> None:
    events: list[Event] = []
    async with trio.open_nursery() as nursery:
        bus = Bus()
        bus.subscribe(events.append)
        on = Scene(nursery)
        job = FakeJob(on.story)
        job.create(bus, lambda _: None)
        with pytest.raises(AssertionError):
            job._move(job.status)
        assert Jobs(nursery, bus).newest_first() == []
    assert [event.data["status"] for event in events] == ["created"]
