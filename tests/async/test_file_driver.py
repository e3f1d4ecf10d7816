"""The file driver's own rules: what is inline, what shares a thread, what a failed flush means."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.block import Descriptor
from blockd.block.drivers.file import FileDriver
from blockd.errors import WouldBlock
from tests.helpers.driver_subjects import open_image
from tests.helpers.slow_calls import SlowCall

SIZE = 1024 * 1024
BLOCK = memoryview(b"x" * 4096)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(bytes(SIZE))
    return path


@pytest.fixture
async def driver(path: Path) -> AsyncIterator[FileDriver]:
    driver = open_image(path)
    yield driver
    await driver.close()


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writes that end behind ``size_bytes`` fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- size and space ---------------------------------------------------------------------------


@pytest.mark.parametrize(("file_bytes", "size_bytes"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
async def test_the_size_is_rounded_up_to_sectors(
    tmp_path: Path, file_bytes: int, size_bytes: int
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * file_bytes)
    driver = open_image(path)
    assert driver.size_bytes == size_bytes
    if size_bytes:
        view = memoryview(bytearray(b"?" * size_bytes))
        await driver.read(0, view)
        assert bytes(view) == b"x" * file_bytes + bytes(size_bytes - file_bytes)
    await driver.close()
    assert path.stat().st_size == file_bytes


async def test_zeroes_give_space_back_only_where_both_allow_it(path: Path) -> None:
    async def space_after(*, option: bool, unmap: bool) -> int:
        path.write_bytes(b"x" * SIZE)
        driver = open_image(path, unmap=option)
        await driver.write_zeroes(0, SIZE, unmap=unmap)
        await driver.close()
        assert path.read_bytes() == bytes(SIZE)
        return path.stat().st_blocks

    full = await space_after(option=False, unmap=False)
    assert full > 0
    assert await space_after(option=False, unmap=True) == full
    assert await space_after(option=True, unmap=False) == full
    assert await space_after(option=True, unmap=True) == 0


async def test_a_discard_gives_space_back(driver: FileDriver, path: Path) -> None:
    await driver.discard(0, SIZE)
    assert path.stat().st_blocks == 0
    assert path.stat().st_size == SIZE


# --- inline or not ----------------------------------------------------------------------------


class Clock:
    """Time that passes only in system calls, or when told to. ``waited``: they wait meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 5_000_000_000
        self.write_ns = 1000
        self.waited = True
        self._waits = 7
        self._pwrite = os.pwrite
        usage = namedtuple("usage", "ru_nvcsw")
        monkeypatch.setattr(resource, "getrusage", lambda _: usage(self._waits))
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.now_ns += self.write_ns
        self._waits += self.waited
        return self._pwrite(fd, data, offset)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def is_inline(driver: FileDriver) -> bool:
    try:
        driver.write_nowait(0, BLOCK)
    except WouldBlock:
        return False
    return True


def pause_ns(driver: FileDriver, clock: Clock) -> int:
    """How long writes stay away from the loop from now on."""
    start_ns, step_ns = clock.now_ns, limits.INLINE_WRITE_PAUSE_MIN_NS // 10
    while not is_inline(driver):
        clock.now_ns += step_ns
    return clock.now_ns - clock.write_ns - start_ns


async def test_quick_writes_stay_inline(driver: FileDriver, clock: Clock) -> None:
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS
    assert all(is_inline(driver) for _ in range(100))


async def test_a_slow_write_sends_the_next_ones_to_a_thread(
    driver: FileDriver, clock: Clock, path: Path
) -> None:
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS + 1
    assert is_inline(driver)
    clock.write_ns = 1000
    with pytest.raises(WouldBlock):
        driver.write_nowait(8192, BLOCK)
    assert path.read_bytes()[8192:12288] == bytes(4096)
    await driver.write(8192, BLOCK)
    assert path.read_bytes()[8192:12288] == BLOCK
    assert pause_ns(driver, clock) == limits.INLINE_WRITE_PAUSE_MIN_NS
    assert is_inline(driver)


async def test_the_pause_doubles_while_writes_stay_slow_and_no_longer(
    driver: FileDriver, clock: Clock
) -> None:
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS + 1
    assert is_inline(driver)
    expected_ns = limits.INLINE_WRITE_PAUSE_MIN_NS
    for _ in range(10):
        assert pause_ns(driver, clock) == expected_ns
        expected_ns = min(expected_ns * 2, limits.INLINE_WRITE_PAUSE_MAX_NS)

    clock.write_ns = 1000
    pause_ns(driver, clock)
    clock.now_ns += 2 * limits.INLINE_WRITE_PAUSE_MAX_NS
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS + 1
    assert is_inline(driver)
    assert pause_ns(driver, clock) == limits.INLINE_WRITE_PAUSE_MIN_NS


@pytest.mark.parametrize("waited", [False, True])
async def test_a_large_write_that_only_lost_the_processor_changes_nothing(
    driver: FileDriver, clock: Clock, *, waited: bool
) -> None:
    clock.waited = waited
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS + 1
    driver.write_nowait(0, memoryview(bytes(limits.INLINE_WRITE_LARGE_BYTES)))
    assert is_inline(driver) == (not waited)


async def test_after_a_slow_write_small_ones_too_may_lose_the_processor(
    driver: FileDriver, clock: Clock
) -> None:
    clock.waited = False
    clock.write_ns = limits.INLINE_WRITE_SLOW_NS + 1
    assert is_inline(driver)
    assert pause_ns(driver, clock) == limits.INLINE_WRITE_PAUSE_MIN_NS
    assert all(is_inline(driver) for _ in range(100))


async def test_an_inline_write_that_the_kernel_takes_in_part_is_completed(
    driver: FileDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    driver.write_nowait(100, BLOCK)
    await driver.write(8192, BLOCK)
    assert path.read_bytes()[100:4196] == BLOCK
    assert path.read_bytes()[8192:12288] == BLOCK


async def test_a_file_system_without_nowait_reads_is_asked_once(
    driver: FileDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*args: Any) -> int:
        asked.append(args)
        raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")

    monkeypatch.setattr(os, "preadv", refuse)
    for _ in range(3):
        with pytest.raises(WouldBlock):
            driver.read_nowait(0, memoryview(bytearray(10)))
    assert len(asked) == 1


async def test_an_inline_read_that_is_short_is_left_to_a_thread(
    driver: FileDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, *rest: preadv(fd, (views[0][:5],), *rest))
    view = memoryview(bytearray(b"?" * 12))
    with pytest.raises(WouldBlock):
        driver.read_nowait(0, view)
    await driver.read(0, view)
    assert bytes(view) == bytes(12)


async def test_an_inline_error_is_raised(driver: FileDriver) -> None:
    with file_size_limit(SIZE // 2), pytest.raises(OSError, match="File too large"):
        driver.write_nowait(SIZE // 2, BLOCK)


# --- in threads -------------------------------------------------------------------------------


@pytest.fixture
def slow_pwrite(monkeypatch: pytest.MonkeyPatch) -> SlowCall:
    slow = SlowCall(os.pwrite)
    monkeypatch.setattr(os, "pwrite", slow)
    return slow


async def test_writes_that_wait_share_one_hop_to_a_thread(
    driver: FileDriver, slow_pwrite: SlowCall, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    hops = []
    run_sync = trio.to_thread.run_sync

    async def counted(call: Any, *args: Any, **kwargs: Any) -> Any:
        if "limiter" in kwargs:
            hops.append(call)
        return await run_sync(call, *args, **kwargs)

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 0, BLOCK)
        await slow_pwrite.wait_begun()
        for number in range(1, 20):
            nursery.start_soon(driver.write, number * 8192, BLOCK)
        await wait_all_tasks_blocked()
        slow_pwrite.release(20)
    assert len(hops) == 2
    assert all(path.read_bytes()[at : at + 4096] == BLOCK for at in range(0, 20 * 8192, 8192))


async def test_in_a_batch_each_write_has_its_own_error(
    driver: FileDriver, slow_pwrite: SlowCall
) -> None:
    failed = []

    async def write(offset: int) -> None:
        try:
            await driver.write(offset, BLOCK)
        except OSError as error:
            failed.append((offset, error.errno))

    with file_size_limit(SIZE // 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, 0)
            await slow_pwrite.wait_begun()
            for offset in (8192, SIZE // 2, 16384, SIZE // 2 + 8192):
                nursery.start_soon(write, offset)
            slow_pwrite.release(5)
    assert sorted(failed) == [(SIZE // 2, errno.EFBIG), (SIZE // 2 + 8192, errno.EFBIG)]


async def test_no_write_succeeds_where_no_thread_could_be_had(
    driver: FileDriver, slow_pwrite: SlowCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []

    async def write(offset: int) -> None:
        try:
            await driver.write(offset, BLOCK)
        except RuntimeError:
            failed.append(offset)

    run_sync = trio.to_thread.run_sync

    async def no_thread_once(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
        raise RuntimeError("can't start new thread")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 0, BLOCK)
        await slow_pwrite.wait_begun()
        for offset in (8192, 16384, 24576):
            nursery.start_soon(write, offset)
        await wait_all_tasks_blocked()
        monkeypatch.setattr(trio.to_thread, "run_sync", no_thread_once)
        slow_pwrite.release(5)
    assert sorted(failed) == [8192, 16384, 24576]
    await driver.write(8192, BLOCK)


async def test_a_thread_that_copies_is_one_of_the_files_own(driver: FileDriver) -> None:
    """So files whose storage hangs leave threads to the others."""

    def common_threads(_: Descriptor, __: int) -> int:
        limiter = trio.from_thread.run_sync(trio.to_thread.current_default_thread_limiter)
        return int(limiter.borrowed_tokens)

    assert await driver.write_by(0, 1, common_threads) == 0


async def test_a_cancelled_write_ends_before_its_caller(
    driver: FileDriver, slow_pwrite: SlowCall, path: Path
) -> None:
    ended = []
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def write(scope: trio.CancelScope, offset: int) -> None:
        with scope:
            try:
                await driver.write(offset, BLOCK)
            finally:
                ended.append(offset)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, scopes[0], 0)
        await slow_pwrite.wait_begun()
        nursery.start_soon(write, scopes[1], 8192)
        await wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert ended == []
        slow_pwrite.release(2)
    assert ended == [0, 8192]
    assert path.read_bytes()[:4096] == BLOCK
    assert path.read_bytes()[8192:12288] == BLOCK
