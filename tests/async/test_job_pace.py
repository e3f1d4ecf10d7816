"""Speed and pause: when a job copies, and what it says of itself meanwhile."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd.job import Job, OnError
from blockd.job.info import block_job_info
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, Scene, scene

EIO = OSError(errno.EIO, "")
ENOSPC = OSError(errno.ENOSPC, "")


def state(job: Job) -> tuple[str, bool, bool]:
    """Status, paused, busy."""
    info = block_job_info(job)
    return info["status"], info["paused"], info["busy"]


async def copied_at(
    on: Scene, job: FakeJob, commands: list[tuple[float, str]] | None = None
) -> list[float]:
    begin = trio.current_time()
    await on.play(job, commands or [])
    return [round(time - begin, 6) for time in job.copied_at]


async def test_a_chunk_goes_each_250_milliseconds(autojump_clock: MockClock) -> None:
    async with scene() as on:
        times = await copied_at(on, FakeJob(on.story, speed=4 * CHUNK_BYTES))
    assert times == [0, 0.25, 0.5, 0.75]


async def test_the_time_a_chunk_takes_counts(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, Plan(chunk_seconds=0.2), speed=4 * CHUNK_BYTES)
        times = await copied_at(on, job)
    assert times == [0, 0.25, 0.5, 0.75]


async def test_the_speed_is_the_jobs_however_many_tasks_it_has(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, Plan(workers=3, chunk_seconds=1), speed=4 * CHUNK_BYTES)
        times = await copied_at(on, job)
    assert times == [0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("commands", "times"),
    [
        pytest.param([(0.3, f"set-speed {CHUNK_BYTES * 10}")], [0, 0.3, 0.3, 0.4], id="faster"),
        pytest.param([(0.3, "set-speed 0")], [0, 0.3, 0.3, 0.3], id="no limit"),
        pytest.param([(1.5, f"set-speed {CHUNK_BYTES // 2}")], [0, 1, 2, 4], id="slower"),
        pytest.param([(0.3, "pause"), (0.6, "resume")], [0, 1, 2, 3], id="short pause"),
        pytest.param([(0.3, "pause"), (7.5, "resume")], [0, 7.5, 8.5, 9.5], id="long pause"),
    ],
)
async def test_a_command_changes_the_wait(
    commands: list[tuple[float, str]], times: list[float], autojump_clock: MockClock
) -> None:
    async with scene() as on:
        job = FakeJob(on.story, speed=CHUNK_BYTES)
        assert await copied_at(on, job, commands) == times


async def test_a_pause_is_complete_when_nothing_is_in_flight(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, Plan(workers=2, chunk_seconds=10))
        await on.start(job)
        await trio.sleep(1)
        assert state(job) == ("running", False, True)
        await on.do("pause")
        assert state(job) == ("running", True, True)
        await trio.sleep(10)
        assert state(job) == ("paused", True, False)
        assert job.current_progress == 2 * CHUNK_BYTES
        await trio.sleep(100)
        assert job.current_progress == 2 * CHUNK_BYTES
        await on.do("resume")
        assert state(job) == ("running", False, False)
        await wait_all_tasks_blocked()
        assert state(job) == ("running", False, True)


async def test_a_cancel_ends_a_pause_before_it_is_complete(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, Plan(chunk_seconds=10, stubborn=True))
        await on.start(job)
        await trio.sleep(1)
        await on.do("pause")
        await on.do("cancel")
        assert state(job) == ("running", False, True)


async def test_an_error_outside_a_turn_stops_at_once(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, speed=CHUNK_BYTES)
        await on.start(job)
        await trio.sleep(0.5)
        job.handle_error("read", errno.EIO, OnError.STOP)
        assert state(job) == ("paused", True, False)


@pytest.mark.parametrize(
    ("errors", "io_status"),
    [
        pytest.param({1: EIO}, "failed", id="broken"),
        pytest.param({1: ENOSPC}, "nospace", id="full"),
    ],
)
@pytest.mark.parametrize("command", ["resume", "cancel"])
async def test_io_status_says_why_a_job_stopped(
    errors: dict[str | int, Exception], io_status: str, command: str, autojump_clock: MockClock
) -> None:
    async with scene() as on:
        plan = Plan(errors=errors, policy=OnError.STOP, chunk_seconds=1)
        job = FakeJob(on.story, plan, auto_dismiss=False)
        await on.start(job)
        assert block_job_info(job)["io-status"] == "ok"
        await trio.sleep(5)
        assert block_job_info(job)["io-status"] == io_status
        job.handle_error("read", errno.EIO, OnError.STOP)
        job.handle_error("read", errno.ENOSPC, OnError.STOP)
        assert block_job_info(job)["io-status"] == io_status  # the first reason
        await on.do(command)
        assert block_job_info(job)["io-status"] == "ok"


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE])
async def test_io_status_stays_where_nothing_stops(
    policy: OnError, autojump_clock: MockClock
) -> None:
    options: dict[str, Any] = {"auto_dismiss": False}
    async with scene() as on:
        job = FakeJob(on.story, Plan(errors={1: EIO}, policy=policy), **options)
        await on.play(job)
        assert block_job_info(job)["io-status"] == "ok"
        assert job.status == "concluded"


async def test_copying_without_a_limit_lets_others_run(autojump_clock: MockClock) -> None:
    """A job whose copying never waits is still no hog, and can be cancelled."""
    async with scene() as on:

        class Eager(FakeJob):
            async def run(self) -> None:
                while True:
                    async with self.turn():
                        self.advance(1)

        job = Eager(on.story)
        await on.start(job)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert 0 < job.current_progress < 100
        await on.do("cancel")
        assert job.status == "null"
