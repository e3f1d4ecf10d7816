"""Starting jobs and finding them again: ids, refusals, queries."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from blockd.errors import BlockdError, DeviceNotActiveError
from tests.helpers.fake_job import CHUNK_BYTES, FakeJob, Plan, scene

SLOW = CHUNK_BYTES


@pytest.mark.parametrize("job_id", ["", "1a", "a b", "-a", ".a", "a/b", "é", "aé", "a\n"])
async def test_an_invalid_id(job_id: str) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, job_id=job_id))
        assert on.jobs.newest_first() == []
    assert on.story.lines == [f"start: {job_id} [close], REFUSED Invalid job ID '{job_id}'"]


@pytest.mark.parametrize("job_id", ["a", "Z", "a-b.c_d9", "a" * 300])
async def test_a_valid_id(job_id: str, autojump_clock: MockClock) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, job_id=job_id, speed=SLOW))
        assert on.jobs.get(job_id).status == "running"


async def test_an_id_is_held_until_the_job_is_dismissed(autojump_clock: MockClock) -> None:
    async with scene() as on:
        first = FakeJob(on.story, auto_dismiss=False)
        await on.start(first)
        await first.wait_concluded()
        on.story.lines.clear()
        await on.start(FakeJob(on.story))
        await on.do("dismiss")
        second = FakeJob(on.story)
        await on.start(second)
        assert on.jobs.get("j") is second
    assert on.story.lines == [
        "start: [close], REFUSED Job ID 'j' already in use",
        "dismiss: null, ok",
        "start: created, [start], running, paused, running, ok, "
        "aborting, [abort], [close], CANCELLED 0/4, concluded, null",
    ]


async def test_a_job_that_is_not_there() -> None:
    async with scene() as on:
        with pytest.raises(BlockdError, match=r"^Job not found$"):
            on.jobs.get("x")
        with pytest.raises(DeviceNotActiveError, match=r"^Block job 'x' not found$"):
            on.jobs.get_legacy("x")


async def test_both_kinds_of_command_find_a_job(autojump_clock: MockClock) -> None:
    async with scene() as on:
        job = FakeJob(on.story, speed=SLOW)
        await on.start(job)
        assert on.jobs.get("j") is on.jobs.get_legacy("j") is job


async def test_a_negative_speed() -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, speed=-1))
        assert on.jobs.newest_first() == []
    assert on.story.lines == [
        "start: created, null, [close], REFUSED Parameter 'speed' expects a non-negative value"
    ]


@pytest.mark.parametrize("auto_dismiss", [True, False])
async def test_a_refused_start_leaves_nothing(*, auto_dismiss: bool) -> None:
    async with scene() as on:
        plan = Plan(errors={"start": BlockdError("no room")})
        await on.start(FakeJob(on.story, plan, auto_dismiss=auto_dismiss))
        assert on.jobs.newest_first() == []
    assert on.story.lines == [
        "start: created, [start], aborting, [close], concluded, null, REFUSED no room"
    ]


@pytest.mark.parametrize("error", [OSError(5, "I/O"), KeyError("bug")], ids=["error", "bug"])
async def test_a_start_raises_what_it_fails_with(error: Exception) -> None:
    async with scene() as on:
        on.story.command("start")
        with pytest.raises(type(error)) as info:
            await on.begin(FakeJob(on.story, Plan(errors={"start": error})))
        assert info.value is error
        assert on.jobs.newest_first() == []
    assert on.story.lines == ["start: created, [start], aborting, [close], concluded, null"]


async def test_rows_of_the_queries(autojump_clock: MockClock) -> None:
    """Fields in the order of QEMU's."""
    async with scene() as on:
        await on.start(FakeJob(on.story, speed=SLOW))
        await trio.sleep(0.5)
        assert [list(row.items()) for row in on.jobs.query()] == [
            [
                ("current-progress", CHUNK_BYTES),
                ("status", "running"),
                ("total-progress", 4 * CHUNK_BYTES),
                ("type", "backup"),
                ("id", "j"),
            ]
        ]
        assert [list(row.items()) for row in on.jobs.query_block()] == [
            [
                ("auto-finalize", True),
                ("io-status", "ok"),
                ("device", "j"),
                ("auto-dismiss", True),
                ("busy", False),
                ("len", 4 * CHUNK_BYTES),
                ("offset", CHUNK_BYTES),
                ("status", "running"),
                ("paused", False),
                ("speed", SLOW),
                ("ready", False),
                ("type", "backup"),
            ]
        ]


async def test_rows_of_a_failed_job_end_with_its_error(autojump_clock: MockClock) -> None:
    async with scene() as on:
        await on.start(FakeJob(on.story, speed=SLOW, auto_finalize=False, auto_dismiss=False))
        await on.do("cancel")
        for row in (*on.jobs.query(), *on.jobs.query_block()):
            assert row["status"] == "concluded"
            assert list(row.items())[-1] == ("error", "Operation canceled")


async def test_rows_of_several_jobs_are_newest_first(autojump_clock: MockClock) -> None:
    async with scene() as on:
        for job_id in ("a", "c", "b"):
            await on.start(FakeJob(on.story, job_id=job_id, speed=SLOW))
        assert [row["id"] for row in on.jobs.query()] == ["b", "c", "a"]
        assert [row["device"] for row in on.jobs.query_block()] == ["b", "c", "a"]
