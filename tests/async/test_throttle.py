"""``throttle``: when requests pass, by a clock that jumps."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from blockd.block import Node, RawDriver
from blockd.block.drivers.throttle import ThrottleDriver
from blockd.errors import WouldBlock
from blockd.objects import Bucket, ThrottleGroup, ThrottleLimits
from tests.helpers.memory_driver import MemoryDriver

KIB = 1024


def throttle(group: ThrottleGroup) -> ThrottleDriver:
    return ThrottleDriver(Node("below", MemoryDriver(64 * KIB)), group, "g")


async def write_times(driver: ThrottleDriver, count: int, length: int = 512) -> list[float]:
    times = []
    begin = trio.current_time()
    for _ in range(count):
        await driver.write(0, memoryview(bytes(length)))
        times.append(round(trio.current_time() - begin, 6))
    return times


@pytest.mark.parametrize(
    ("limits", "times"),
    [
        pytest.param(ThrottleLimits(), [0, 0, 0, 0], id="none"),
        # A tenth of a second's units come at once, and one request more.
        pytest.param(ThrottleLimits(iops_total=Bucket(10)), [0, 0, 0.1, 0.2], id="operations"),
        pytest.param(ThrottleLimits(iops_write=Bucket(10)), [0, 0, 0.1, 0.2], id="writes"),
        pytest.param(ThrottleLimits(iops_read=Bucket(10)), [0, 0, 0, 0], id="reads only"),
        pytest.param(ThrottleLimits(bps_total=Bucket(5120)), [0, 0, 0.1, 0.2], id="bytes"),
        pytest.param(
            ThrottleLimits(iops_total=Bucket(10), iops_size=256),
            [0, 0.1, 0.3, 0.5],
            id="large ones",
        ),
        pytest.param(ThrottleLimits(iops_total=Bucket(1, burst=3)), [0, 0, 0, 0], id="burst"),
        pytest.param(
            ThrottleLimits(iops_total=Bucket(1, burst=10, burst_seconds=2)),
            [0, 0, 0.1, 0.2],
            id="a burst has its rate",
        ),
    ],
)
async def test_when_writes_pass(
    limits: ThrottleLimits, times: list[float], autojump_clock: MockClock
) -> None:
    assert await write_times(throttle(ThrottleGroup(limits)), 4) == times


async def test_a_burst_ends(autojump_clock: MockClock) -> None:
    limits = ThrottleLimits(iops_total=Bucket(1, burst=10, burst_seconds=2))
    times = await write_times(throttle(ThrottleGroup(limits)), 40)
    assert times[19] < 2
    assert times[39] - times[38] == pytest.approx(1)


async def test_members_take_turns_whatever_their_queues(autojump_clock: MockClock) -> None:
    group = ThrottleGroup(ThrottleLimits(iops_total=Bucket(10)))
    busy, modest = throttle(group), throttle(group)
    order: list[str] = []

    async def write(driver: ThrottleDriver, name: str) -> None:
        await driver.write(0, memoryview(b"x"))
        order.append(name)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(write, busy, "busy")
        await trio.sleep(0.55)
        nursery.start_soon(write, modest, "modest")
        nursery.start_soon(write, modest, "modest")
    assert order[7:12].count("modest") == 2


async def test_a_cancelled_request_passes_its_turn_on(autojump_clock: MockClock) -> None:
    driver = throttle(ThrottleGroup(ThrottleLimits(iops_total=Bucket(1))))
    await write_times(driver, 1)
    begin = trio.current_time()

    async def write_within(seconds: float) -> None:
        with trio.move_on_after(seconds):
            await driver.write(0, memoryview(b"x"))

    async with trio.open_nursery() as nursery:
        for seconds in (0.2, 0.5, 100):
            nursery.start_soon(write_within, seconds)
    assert trio.current_time() - begin == pytest.approx(0.9)


async def test_what_passes_at_once_counts_once(autojump_clock: MockClock) -> None:
    below = MemoryDriver(64 * KIB)
    driver = ThrottleDriver(
        Node("below", below), ThrottleGroup(ThrottleLimits(iops_total=Bucket(10))), "g"
    )
    view = memoryview(bytearray(512))
    with pytest.raises(WouldBlock):
        driver.read_nowait(0, view)
    below.nowait = lambda _: True
    driver.read_nowait(0, view)
    driver.write_nowait(0, view)
    with pytest.raises(WouldBlock):
        driver.read_nowait(0, view)
    assert below.counts == {"read": 1, "write": 1}


async def test_stopping_a_nodes_writes_does_not_wait_for_the_limits(
    autojump_clock: MockClock,
) -> None:
    driver = throttle(ThrottleGroup(ThrottleLimits(iops_total=Bucket(1))))
    top = Node("top", RawDriver(Node("throttle", driver)))
    await write_times(driver, 1)
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(top.write, 0, memoryview(bytes(512)))
        await trio.sleep(0.1)
        async with top.quiesced():
            await top.read(0, memoryview(bytearray(512)))
            assert trio.current_time() - begin == pytest.approx(0.1)
    # All have counted, the three, the read and the one before, but for what leaked in 0.1 s twice.
    assert await write_times(driver, 2) == pytest.approx([4.8, 5.8])
