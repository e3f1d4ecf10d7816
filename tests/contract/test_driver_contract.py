"""What every driver must do alike, whatever it stands on."""

from __future__ import annotations

import random
import weakref
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.block import Driver
from blockd.errors import BlockdError, WouldBlock
from tests.helpers.driver_subjects import SUBJECTS, Subject

STEPS = 80
FIXED_SIZE = (
    "Cannot (resize fixed-size raw disks|resize NBD nodes|grow device files)"
    "|does not support resize"
)


@pytest.fixture(params=[*SUBJECTS], ids=[*SUBJECTS])
async def subject(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Subject]:
    # So that what takes several pieces does so on small images too.
    monkeypatch.setattr(limits, "DIRECT_SCRATCH_BYTES", 16 * 1024)
    make = SUBJECTS[request.param]
    async with trio.open_nursery() as tasks:
        with ExitStack() as stack:
            subject = make(stack, tmp_path)
            if not isinstance(subject, Subject):
                subject = await subject(tasks)
            yield subject
            await close(subject.driver)
            if subject.close is not None:
                await subject.close()


async def close(driver: Driver) -> None:
    await driver.close()
    for child in driver.children.values():
        await close(child.driver)


async def read(driver: Driver, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"?" * length))
    await driver.read(offset, view)
    return bytes(view)


async def content(driver: Driver) -> bytes:
    return await read(driver, 0, driver.size_bytes)


def read_nowait(driver: Driver, offset: int, length: int) -> bytes | None:
    """What the driver reads at once; None where it would block."""
    view = memoryview(bytearray(b"?" * length))
    try:
        driver.read_nowait(offset, view)
    except WouldBlock:
        return None
    return bytes(view)


def some_range(rng: random.Random, size: int) -> tuple[int, int]:
    """Aligned and unaligned, small and large, now and then up to the very end."""
    unit = rng.choice([1, 1, 512, 4096])
    longest = rng.choice([1, 600, 5000, 70_000])
    offset = rng.randrange(size) // unit * unit
    length = min(-(-rng.randint(1, longest) // unit) * unit, size - offset)
    if rng.randrange(8) == 0:
        offset = size - length
    return offset, length


async def check_allocation(subject: Subject, offset: int, length: int) -> None:
    """Runs in order, without gaps, and what they call zero is zero."""
    runs = await subject.driver.allocation(offset, length)
    assert runs
    at = offset
    for run in runs:
        assert run.extent.offset == at
        assert run.extent.length > 0
        at = run.extent.end
        if run.zero:
            assert not any(subject.model[run.extent.offset : at])
    assert at <= offset + length


# --- one thing after the other ----------------------------------------------------------------


async def step(subject: Subject, rng: random.Random) -> None:
    """Do something, to the driver and to the model."""
    driver, model = subject.driver, subject.model
    offset, length = some_range(rng, len(model))
    end = offset + length
    match rng.randrange(7):
        case 0:
            data = rng.randbytes(length)
            await driver.write(offset, memoryview(data))
            model[offset:end] = data
        case 1:
            data = rng.randbytes(length)
            try:
                driver.write_nowait(offset, memoryview(data))
                model[offset:end] = data
            except WouldBlock:
                pass
        case 2:
            await driver.write_zeroes(offset, length, unmap=rng.randrange(2) == 0)
            model[offset:end] = bytes(length)
        case 3:
            await driver.discard(offset, length)
            if subject.unmap:
                model[offset:end] = await read(driver, offset, length)
        case 4:
            assert await read(driver, offset, length) == model[offset:end]
        case 5:
            assert read_nowait(driver, offset, length) in (None, model[offset:end])
        case 6:
            await check_allocation(subject, offset, length)


@pytest.mark.parametrize("seed", range(4))
async def test_any_sequence_of_calls_does_what_it_does_to_plain_bytes(
    subject: Subject, seed: int
) -> None:
    assert subject.driver.size_bytes == len(subject.model)
    assert await content(subject.driver) == subject.model
    rng = random.Random(seed)
    for _ in range(STEPS):
        await step(subject, rng)
    await subject.driver.flush()
    assert await content(subject.driver) == subject.model


async def test_the_last_byte_can_be_written_and_read(subject: Subject) -> None:
    last = subject.driver.size_bytes - 1
    await subject.driver.write(last, memoryview(b"!"))
    assert await read(subject.driver, last, 1) == b"!"
    subject.model[last:] = b"!"
    assert await content(subject.driver) == subject.model


async def test_a_write_may_cover_everything(subject: Subject) -> None:
    data = random.Random(1).randbytes(subject.driver.size_bytes)
    await subject.driver.write(0, memoryview(data))
    assert await content(subject.driver) == data


@pytest.mark.parametrize("unmap", [False, True])
async def test_zeroes_may_cover_everything(subject: Subject, *, unmap: bool) -> None:
    size = subject.driver.size_bytes
    await subject.driver.write_zeroes(0, size, unmap=unmap)
    assert await content(subject.driver) == bytes(size)
    assert subject.driver.size_bytes == size


async def test_a_discard_touches_nothing_else(subject: Subject) -> None:
    await subject.driver.discard(100_001, 50_000)
    now = await content(subject.driver)
    assert now[:100_001] == subject.model[:100_001]
    assert now[150_001:] == subject.model[150_001:]
    if not subject.unmap:
        assert now == subject.model


async def test_allocation_says_something_about_every_byte(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ALLOCATION_RUNS_LIMIT", 2)
    offset, size = 0, subject.driver.size_bytes
    while offset < size:
        await check_allocation(subject, offset, size - offset)
        runs = await subject.driver.allocation(offset, size - offset)
        offset = runs[-1].extent.end
    assert offset == size


async def test_a_call_that_would_block_keeps_nothing(subject: Subject) -> None:
    """Not even in the traceback of what it raises: there are many such calls."""
    view = memoryview(bytearray(10))
    kept = weakref.ref(view)
    for call in (subject.driver.read_nowait, subject.driver.write_nowait):
        with suppress(WouldBlock):
            call(0, view)
    del view
    assert kept() is None


@pytest.mark.parametrize("size", [0, 512, 65_536, 70_144, 307_200, 409_600])
async def test_another_size_keeps_what_is_within_both(subject: Subject, size: int) -> None:
    """A driver that can't have it says so and is as it was; one that can reads zeroes behind."""
    driver, model = subject.driver, subject.model
    if subject.fixed_size or (is_device(driver) and size > len(model)):
        with pytest.raises(BlockdError, match=FIXED_SIZE):
            await driver.truncate(size)
        assert await content(driver) == model
        return
    await driver.truncate(size)
    assert driver.size_bytes == (len(model) if is_device(driver) else size)
    kept = min(driver.size_bytes, len(model))
    assert await content(driver) == model[:kept] + bytes(driver.size_bytes - kept)
    await driver.truncate(len(model))
    assert await content(driver) == model[:kept] + bytes(len(model) - kept)


def is_device(driver: Driver) -> bool:
    """A device has the size that it has; a smaller one is only looked at, as in the peer."""
    return driver.name == "host_device"


# --- at the same time -------------------------------------------------------------------------


async def work_on(subject: Subject, start: int, end: int, seed: int) -> None:
    """Write, zero and discard in a range of one's own."""
    rng = random.Random(seed)
    driver, model = subject.driver, subject.model
    for _ in range(12):
        offset, length = some_range(rng, end - start)
        offset += start
        kind = rng.randrange(4)
        if kind == 0:
            await driver.write_zeroes(offset, length, unmap=rng.randrange(2) == 0)
            model[offset : offset + length] = bytes(length)
        elif kind == 1:
            await driver.discard(offset, length)
            if subject.unmap:
                model[offset : offset + length] = await read(driver, offset, length)
        else:
            data = rng.randbytes(length)
            await driver.write(offset, memoryview(data))
            model[offset : offset + length] = data


@pytest.mark.parametrize("stripe_bytes", [700, 5001])
async def test_neighbours_that_change_at_the_same_time_lose_nothing(
    subject: Subject, stripe_bytes: int
) -> None:
    starts = range(65_000, 65_000 + 16 * stripe_bytes, stripe_bytes)
    async with trio.open_nursery() as nursery:
        for seed, start in enumerate(starts):
            nursery.start_soon(partial(work_on, subject, start, start + stripe_bytes, seed))
    assert await content(subject.driver) == subject.model


async def test_of_overlapping_writes_each_block_comes_from_one(subject: Subject) -> None:
    """Whatever the order; what none of them covers is as it was."""
    async with trio.open_nursery() as nursery:
        for letter in b"abcdefgh":
            offset = 1000 + letter
            data = memoryview(bytes([letter]) * 1000)
            nursery.start_soon(subject.driver.write, offset, data)
    now = await content(subject.driver)
    first, last = 1000 + ord("a"), 1000 + ord("h") + 1000
    assert now[:first] == subject.model[:first]
    assert set(now[first:last]) <= set(b"abcdefgh")
    assert now[last:] == subject.model[last:]
