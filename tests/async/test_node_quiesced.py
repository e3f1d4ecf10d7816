"""The quiet instant of a node: no change in flight, none beginning, whatever is cancelled."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Node
from tests.helpers.watched_driver import WatchedDriver

DATA = memoryview(b"x" * 512)

AsyncWrite = Callable[[Node], Awaitable[None]]

CHANGES: dict[str, tuple[str, AsyncWrite]] = {
    "write": ("write", lambda node: node.write(0, DATA)),
    "FUA": ("flush", lambda node: node.write(0, DATA, fua=True)),
    "write_zeroes": ("write_zeroes", lambda node: node.write_zeroes(0, 512, unmap=True)),
    "discard": ("discard", lambda node: node.discard(0, 512)),
}
each_change = pytest.mark.parametrize(("operation", "change"), CHANGES.values(), ids=CHANGES.keys())


@pytest.fixture
def driver() -> WatchedDriver:
    return WatchedDriver(64 * 1024)


@pytest.fixture
def node(driver: WatchedDriver) -> Node:
    return Node("n", driver)


class Quieted:
    """A task that is in ``node.quiesced()``, or on its way there."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.reached = trio.Event()
        self.leave = trio.Event()

    async def run(self) -> None:
        async with self._node.quiesced():
            self.reached.set()
            await self.leave.wait()


@each_change
async def test_it_waits_for_what_is_in_flight_and_holds_back_what_comes(
    node: Node, driver: WatchedDriver, operation: str, change: AsyncWrite
) -> None:
    hold = driver.hold(operation)
    quieted = Quieted(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, node)
        nursery.start_soon(change, node)
        await wait_all_tasks_blocked()
        in_flight = driver.counts[operation]
        nursery.start_soon(quieted.run)
        await wait_all_tasks_blocked()
        nursery.start_soon(change, node)
        await wait_all_tasks_blocked()
        assert not quieted.reached.is_set()
        assert driver.counts[operation] == in_flight == 2

        hold.release()
        await quieted.reached.wait()
        await wait_all_tasks_blocked()
        assert driver.counts[operation] == in_flight

        quieted.leave.set()
        await driver.wait_seen(operation, in_flight + 1)


async def test_it_opens_only_when_all_who_wanted_it_have_left(
    node: Node, driver: WatchedDriver
) -> None:
    first, second = Quieted(node), Quieted(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run)
        nursery.start_soon(second.run)
        await first.reached.wait()
        await second.reached.wait()
        nursery.start_soon(CHANGES["write"][1], node)
        first.leave.set()
        await wait_all_tasks_blocked()
        assert driver.seen == []
        second.leave.set()
        await driver.wait_seen("write", 1)


async def test_a_failed_change_is_no_longer_in_flight(node: Node, driver: WatchedDriver) -> None:
    driver.fail("write", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await node.write(0, DATA)
    async with node.quiesced():
        pass


async def test_a_body_that_raises_opens_the_node(node: Node, driver: WatchedDriver) -> None:
    with pytest.raises(ValueError, match="body"):
        async with node.quiesced():
            raise ValueError("body")
    await node.write(0, DATA)
    assert driver.seen == ["write"]


async def test_cancelling_the_wait_for_quiet_opens_the_node(
    node: Node, driver: WatchedDriver
) -> None:
    hold = driver.hold("write")
    quieted = Quieted(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(CHANGES["write"][1], node)
        await driver.wait_seen("write", 1)
        async with trio.open_nursery() as inner:
            inner.start_soon(quieted.run)
            await wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        assert not quieted.reached.is_set()
        nursery.start_soon(CHANGES["write"][1], node)
        await driver.wait_seen("write", 2)
        hold.release()


@each_change
async def test_a_cancelled_change_is_in_flight_until_the_driver_has_let_it_go(
    node: Node, driver: WatchedDriver, operation: str, change: AsyncWrite
) -> None:
    hold = driver.hold(operation)
    driver.stubborn = True
    quieted = Quieted(node)
    scope = trio.CancelScope()

    async def cancelled_change() -> None:
        with scope:
            await change(node)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancelled_change)
        await driver.wait_seen(operation, 1)
        scope.cancel()
        nursery.start_soon(quieted.run)
        await wait_all_tasks_blocked()
        assert not quieted.reached.is_set()
        hold.release()
        await quieted.reached.wait()
        quieted.leave.set()


@each_change
async def test_a_change_that_is_cancelled_leaves_nothing_behind(
    node: Node, driver: WatchedDriver, operation: str, change: AsyncWrite
) -> None:
    driver.hold(operation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, node)
        await driver.wait_seen(operation, 1)
        nursery.cancel_scope.cancel()
    async with node.quiesced():
        pass


async def test_a_change_that_is_cancelled_while_held_back_never_happens(
    node: Node, driver: WatchedDriver
) -> None:
    async with node.quiesced():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(CHANGES["write"][1], node)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert node.bitmaps.recent == []
    async with node.quiesced():
        pass
    assert driver.seen == []


class StuckHook:
    """A point-in-time view that never finds the old data safe."""

    def before_write_nowait(self, offset: int, length: int) -> bool:
        return False

    async def before_write(self, offset: int, length: int) -> None:
        await trio.sleep_forever()


async def test_a_change_that_is_cancelled_in_a_hook_never_reaches_the_driver(
    node: Node, driver: WatchedDriver
) -> None:
    hook = StuckHook()
    async with node.quiesced():
        node.add_hook(hook)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(CHANGES["write"][1], node)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    async with node.quiesced():
        node.remove_hook(hook)
    assert driver.seen == []
