"""What a flush promises, above all after one that failed."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block.drivers.file import FileDriver
from blockd.block.drivers.opening import open_file
from tests.helpers.driver_subjects import open_image
from tests.helpers.slow_calls import SlowCall


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[FileDriver]:
    (tmp_path / "image").write_bytes(bytes(4096))
    driver = open_image(tmp_path / "image")
    yield driver
    await driver.close()


@pytest.fixture
def slow_sync(monkeypatch: pytest.MonkeyPatch) -> SlowCall:
    slow = SlowCall(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", slow)
    return slow


class Flushes:
    """Flushes that run beside the test, and how each ended."""

    def __init__(self, driver: FileDriver, nursery: trio.Nursery) -> None:
        self._driver = driver
        self._nursery = nursery
        self.results: dict[int, int | None] = {}

    def start(self, number: int, scope: trio.CancelScope | None = None) -> None:
        self._nursery.start_soon(self._flush, number, scope or trio.CancelScope())

    async def _flush(self, number: int, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await self._driver.flush()
                self.results[number] = None
            except OSError as error:
                self.results[number] = error.errno


async def test_after_a_flush_that_failed_none_succeeds(
    driver: FileDriver, slow_sync: SlowCall
) -> None:
    slow_sync.fail(OSError(errno.EIO, os.strerror(errno.EIO)))
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error") as raised:
            await driver.flush()
        assert raised.value.errno == errno.EIO
    assert slow_sync.calls == 1


async def test_a_flush_at_the_time_of_one_that_fails_does_not_succeed(
    driver: FileDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells one caller alone that it has lost pages; the other must not be lied to."""
    lost = SlowCall(os.fdatasync)

    def first_is_told(fd: int) -> None:
        if lost.calls == 0:
            lost(fd)

    monkeypatch.setattr(os, "fdatasync", first_is_told)
    async with trio.open_nursery() as nursery:
        flushes = Flushes(driver, nursery)
        flushes.start(1)
        await lost.wait_begun()
        flushes.start(2)
        await wait_all_tasks_blocked()
        assert flushes.results == {}
        lost.fail(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert flushes.results == {1: errno.EIO, 2: errno.EIO}


async def test_flushes_that_wait_share_one(driver: FileDriver, slow_sync: SlowCall) -> None:
    """But never one that had begun before they came: it may have missed what they are about."""
    async with trio.open_nursery() as nursery:
        flushes = Flushes(driver, nursery)
        flushes.start(1)
        await slow_sync.wait_begun()
        for number in (2, 3, 4):
            flushes.start(number)
        await wait_all_tasks_blocked()
        slow_sync.release()
        await slow_sync.wait_begun()
        assert flushes.results == {1: None}
        slow_sync.release()
    assert flushes.results == {1: None, 2: None, 3: None, 4: None}
    assert slow_sync.calls == 2


async def test_a_flush_that_was_cancelled_stands_for_no_other(
    driver: FileDriver, slow_sync: SlowCall
) -> None:
    async with trio.open_nursery() as nursery:
        flushes = Flushes(driver, nursery)
        flushes.start(1)
        await slow_sync.wait_begun()
        scope = trio.CancelScope()
        flushes.start(2, scope)
        await wait_all_tasks_blocked()
        flushes.start(3)
        await wait_all_tasks_blocked()
        scope.cancel()
        slow_sync.release()
        await slow_sync.wait_begun()
        assert 3 not in flushes.results
        slow_sync.release()
    assert flushes.results == {1: None, 3: None}


async def test_a_device_that_can_not_be_synced_has_nothing_to_flush() -> None:
    driver = open_image("/dev/null", driver="host_device")
    await driver.flush()
    await driver.close()


@pytest.mark.parametrize(("flushes", "read_only"), [(False, False), (True, True)])
async def test_a_flush_may_have_nothing_to_do(
    tmp_path: Path, slow_sync: SlowCall, *, flushes: bool, read_only: bool
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    driver = open_file(
        str(path),
        driver="file",
        read_only=read_only,
        auto_read_only=False,
        direct=False,
        unmap=True,
        flushes=flushes,
    )
    await driver.flush()
    await driver.close()
    assert slow_sync.calls == 0
