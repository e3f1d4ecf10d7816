"""Sync none under any guest: the target, where it was filled before, is the disk of the start."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from blockd.backup import Sync
from tests.helpers.backup_rig import CLUSTER, open_rig, pattern, use_small_limits
from tests.helpers.memory_driver import MemoryDriver

OLD = pattern(12, 300)
SIZE = len(OLD)

WRITES = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5 * CLUSTER)).map(
        lambda drawn: (drawn[0], min(drawn[1], SIZE - drawn[0]))
    ),
    max_size=20,
)


async def overwrite(
    source: MemoryDriver, target: MemoryDriver, guests: list[list[tuple[int, int]]]
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.NONE)
        await rig.start(job)

        async def write(writes: list[tuple[int, int]]) -> None:
            for offset, length in writes:
                await rig.source.write(offset, memoryview(b"\xff" * length))

        async with trio.open_nursery() as nursery:
            for writes in guests:
                nursery.start_soon(write, writes)
        await job.cancel()
        assert await rig.finish(job) == "Operation canceled"


@given(guests=st.lists(WRITES, max_size=3), cached=st.booleans(), filled=st.booleans())
def test_the_target_has_the_old_data_of_all_that_was_written(
    guests: list[list[tuple[int, int]]], *, cached: bool, filled: bool
) -> None:
    source, target = MemoryDriver(OLD), MemoryDriver(OLD if filled else SIZE)
    source.nowait = lambda _: cached
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_limits(monkeypatch)
        trio.run(overwrite, source, target, guests)
    assert bytes(target.data[:SIZE]) == expected(guests, filled=filled)


def expected(guests: list[list[tuple[int, int]]], *, filled: bool) -> bytes:
    if filled:
        return OLD
    data = bytearray(SIZE)
    for offset, length in (each for writes in guests for each in writes):
        first, end = offset // CLUSTER * CLUSTER, -(-(offset + length) // CLUSTER) * CLUSTER
        data[first:end] = OLD[first:end]
    return bytes(data)
