"""O_DIRECT: whole blocks, of which nobody else's bytes may get lost."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block.drivers.direct import DirectFileDriver
from tests.helpers.driver_subjects import open_image
from tests.helpers.slow_calls import SlowCall

#: No multiple of a block of 4096 bytes, as a file made on another machine may be.
FILE_BYTES = 10_000
SIZE = 10_240


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"." * FILE_BYTES)
    return path


@pytest.fixture
async def driver(path: Path) -> AsyncIterator[DirectFileDriver]:
    driver = open_image(path, direct=True)
    assert isinstance(driver, DirectFileDriver)
    # As on a disk with such sectors, whatever this one has.
    driver._alignment_bytes = 4096
    yield driver
    await driver.close()


@pytest.fixture
def slow_pwrite(monkeypatch: pytest.MonkeyPatch) -> SlowCall:
    slow = SlowCall(os.pwrite)
    monkeypatch.setattr(os, "pwrite", slow)
    return slow


async def test_a_write_in_the_last_block_does_not_grow_the_image(
    driver: DirectFileDriver, path: Path
) -> None:
    await driver.write(8200, memoryview(b"new"))
    assert path.stat().st_size <= SIZE
    await driver.write(SIZE - 1, memoryview(b"!"))
    await driver.write_zeroes(SIZE - 100, 50, unmap=False)
    assert path.stat().st_size == SIZE
    expected = bytearray(b"." * FILE_BYTES + bytes(SIZE - FILE_BYTES))
    expected[8200:8203] = b"new"
    expected[-100:] = bytes(99) + b"!"
    assert path.read_bytes() == expected
    view = memoryview(bytearray(SIZE))
    await driver.read(0, view)
    assert bytes(view) == expected


async def test_two_writes_to_one_block_take_turns(
    driver: DirectFileDriver, slow_pwrite: SlowCall, path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 100, memoryview(b"first"))
        await slow_pwrite.wait_begun()
        nursery.start_soon(driver.write, 200, memoryview(b"second"))
        nursery.start_soon(partial(driver.write_zeroes, 300, 5, unmap=False))
        await wait_all_tasks_blocked()
        assert slow_pwrite.calls == 1
        slow_pwrite.release(3)
    content = path.read_bytes()
    assert content[100:105] == b"first"
    assert content[200:206] == b"second"
    assert content[300:305] == bytes(5)


async def test_writes_to_different_blocks_go_side_by_side(
    driver: DirectFileDriver, slow_pwrite: SlowCall
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 100, memoryview(b"first"))
        nursery.start_soon(driver.write, 5000, memoryview(b"second"))
        await slow_pwrite.wait_begun()
        await slow_pwrite.wait_begun()
        slow_pwrite.release(2)


async def test_a_write_that_is_cancelled_while_it_waits_for_its_block_never_happens(
    driver: DirectFileDriver, slow_pwrite: SlowCall, path: Path
) -> None:
    scope = trio.CancelScope()

    async def cancelled_write() -> None:
        with scope:
            await driver.write(200, memoryview(b"second"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 100, memoryview(b"first"))
        await slow_pwrite.wait_begun()
        nursery.start_soon(cancelled_write)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        slow_pwrite.release()
        nursery.start_soon(driver.write, 300, memoryview(b"third"))
        slow_pwrite.release()
    assert path.read_bytes()[:4096].replace(b".", b"") == b"firstthird"
