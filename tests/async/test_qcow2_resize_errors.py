"""A qcow2 image whose resize fails half-way has its old size, and keeps what is written then."""

from __future__ import annotations

import errno

import pytest

from blockd import limits
from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from tests.helpers.memory_driver import MemoryDriver

SIZE = 96 * limits.KIB
OPTIONS = ImageOptions(SIZE, cluster_size_bytes=512)
#: The first cuts off L2 tables, the second moves the L1 table.
SIZES = [SIZE // 3, 64 * SIZE]


async def open_driver(storage: MemoryDriver) -> Qcow2Driver:
    file = Node("file", storage)
    image = await open_image(file, await read_header(file), discard_freed=True)
    return Qcow2Driver(image, direct=False, flushes=True, unmap=True)


async def full_image() -> bytes:
    storage = MemoryDriver(0)
    await create_image(Node("new", storage), OPTIONS)
    driver = await open_driver(storage)
    await driver.write(0, memoryview(b"o" * SIZE))
    await driver.close()
    return bytes(storage.data)


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("size_bytes", SIZES)
async def test_each_step_may_fail(operation: str, size_bytes: int) -> None:
    image = await full_image()
    for step in range(1, 100):
        storage = MemoryDriver(image)
        driver = await open_driver(storage)
        fault = storage.fail(operation, errno.EIO, nth=step)
        try:
            await driver.truncate(size_bytes)
        except OSError:
            assert driver.size_bytes == SIZE
        if not fault.hits:
            assert step > 3
            return
        await driver.write(SIZE - 512, memoryview(b"n" * 512))
        await driver.flush()
        await driver.close()
        await assert_kept(storage)
    pytest.fail("the resize has too many steps")


async def assert_kept(storage: MemoryDriver) -> None:
    again = await open_driver(storage)
    assert again.size_bytes == SIZE
    last = bytearray(512)
    await again.read(SIZE - 512, memoryview(last))
    assert last == b"n" * 512
    await again.close()
