"""The speed of a job: when its chunks go. The times are those at which QEMU's went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.job import RateLimit

KIB = 1024
MIB = 1024 * KIB
CHUNK = 64 * KIB


def chunk_times(
    speed: int, until: float, *changes: tuple[float, int], chunk: int = CHUNK
) -> list[float]:
    """When the chunks go, if each takes no time; ``changes`` are (time, new speed)."""
    limit, now, times = RateLimit(speed), 0.0, []
    coming = list(changes)
    while now < until:
        ready = limit.ready_at(now)
        if coming and ready >= coming[0][0]:
            now, speed = coming.pop(0)
            limit.set_speed(speed)
        elif ready > now:
            now = ready
        else:
            times.append(round(now, 6))
            limit.charge(chunk)
    return times


def test_steps_are_one_chunk_each_250_milliseconds() -> None:
    assert chunk_times(4 * CHUNK, 1.6) == [0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


@pytest.mark.parametrize(
    ("speed", "until", "changes", "times"),
    [
        pytest.param(MIB, 0.4, [], [0, 0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375], id="burst"),
        pytest.param(CHUNK, 0.5, [(0.3, MIB)], [0, 0.3, 0.3, 0.3, 0.425, 0.425], id="faster"),
        pytest.param(CHUNK, 1.6, [(0.3, 2 * CHUNK)], [0, 0.5, 1.0, 1.5], id="a little faster"),
        pytest.param(CHUNK, 3.5, [(0.3, 0), (0.3, CHUNK)], [0, 1.0, 2.0, 3.0], id="off and on"),
    ],
)
def test_the_chunks_go_when_they_may(
    speed: int, until: float, changes: list[tuple[float, int]], times: list[float]
) -> None:
    assert chunk_times(speed, until, *changes) == times


def test_a_chunk_larger_than_the_share_of_a_slice_goes_all_the_same() -> None:
    assert chunk_times(4 * CHUNK, 9.0, chunk=MIB) == [0, 4.0, 8.0]


def test_without_a_limit_nothing_waits_and_nothing_is_owed() -> None:
    limit = RateLimit(0)
    for _ in range(1000):
        assert limit.ready_at(5.0) == 5.0
        limit.charge(MIB)
    limit.set_speed(1)
    assert limit.ready_at(5.0) == 5.0


def test_a_slower_speed_counts_from_the_next_chunk_on() -> None:
    """QEMU counts what went before at the new speed too: the third chunk would go at 1.5."""
    assert chunk_times(2 * CHUNK, 3.5, (0.6, CHUNK)) == [0, 0.5, 1.0, 2.0, 3.0]


def test_what_went_fast_does_not_hold_up_a_slow_job_for_long() -> None:
    limit = RateLimit(1024 * MIB)
    assert limit.ready_at(0.0) == 0.0
    limit.charge(128 * MIB)
    limit.set_speed(MIB)
    assert limit.ready_at(0.0) == pytest.approx(0.125)


@given(
    speed=st.integers(1, 1 << 40),
    chunks=st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0, 1)), min_size=1, max_size=50),
)
def test_on_the_whole_the_speed_is_kept(speed: int, chunks: list[tuple[int, float]]) -> None:
    """Whenever a chunk goes, what went before fits in the time since, or in one slice's share."""
    limit, now, sent = RateLimit(speed), 0.0, 0
    for nbytes, pause in chunks:
        now = limit.ready_at(now)
        assert limit.ready_at(now) == now
        assert sent <= speed * (now + 0.1) * (1 + 1e-9)
        limit.charge(nbytes)
        sent += nbytes
        now += pause
