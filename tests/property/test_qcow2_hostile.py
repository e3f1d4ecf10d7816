"""Images whose tables were changed at random: a clear error, never a hang or a wrong write."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio

from blockd import limits
from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.errors import BlockdError
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.patience import PATIENCE_SECONDS

SIZE_BYTES = 256 * limits.KIB
#: What a write to the wrong place could make of a file this small.
LARGEST_BYTES = limits.GIB


async def make_image(options: ImageOptions) -> tuple[bytes, int]:
    """An image with data, zeroes and compressed clusters; and where its tables end."""
    storage = MemoryDriver(0)
    storage.filename = "/image"
    file = Node("new", storage)
    await create_image(file, options)
    tables_end = len(storage.data)
    driver = Qcow2Driver(
        await open_image(file, await read_header(file)), direct=False, flushes=True, unmap=True
    )
    cluster = options.cluster_size_bytes
    await driver.write(0, memoryview(bytes(range(256)) * (cluster // 64)))
    await driver.write_compressed(8 * cluster, memoryview(b"ab" * (cluster // 2)))
    await driver.write_zeroes(10 * cluster, cluster, unmap=False)
    await driver.close()
    return bytes(storage.data), tables_end + cluster


def damage(image: bytes, tables_end: int, rng: random.Random) -> bytes:
    """Change some numbers of the header or the tables."""
    damaged = bytearray(image)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(tables_end, len(image)) // 8) * 8
        if rng.random() < 0.3:
            at = rng.randrange(14) * 8
        number = rng.choice(
            [
                rng.getrandbits(64),
                1 << rng.randrange(64),
                (1 << 63) | rng.randrange(0, len(image), 512),
                (1 << 62) | rng.getrandbits(56),
                0,
            ]
        )
        damaged[at : at + 8] = number.to_bytes(8, "big")
    return bytes(damaged)


async def use(file: Node) -> None:
    """Open the image, read it, write to it, give it another size, and close it."""
    header = await read_header(file)
    image = await open_image(file, header, backing=None)
    driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
    try:
        size = min(driver.size_bytes, SIZE_BYTES)
        for offset in range(0, size, 16 * limits.KIB):
            length = min(16 * limits.KIB, size - offset)
            try:
                await driver.read(offset, memoryview(bytearray(length)))
                await driver.allocation(offset, length)
                await driver.write(offset, memoryview(b"x" * length))
                await driver.discard(offset, length // 2)
                await driver.flush()
            except OSError:
                continue
        await driver.truncate(2 * SIZE_BYTES)
    finally:
        await driver.close()


@pytest.mark.parametrize("seed", range(300))
async def test_a_damaged_image_does_no_harm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", 64 * limits.KIB)
    rng = random.Random(seed)
    options = ImageOptions(
        size_bytes=SIZE_BYTES,
        version=rng.choice([2, 3]),
        cluster_size_bytes=rng.choice([512, 4096, 65_536]),
    )
    disk = MemoryDriver(damage(*await make_image(options), rng))
    disk.filename = "/image"
    with trio.fail_after(PATIENCE_SECONDS):
        with suppress(BlockdError, OSError):
            await use(Node("file", disk))
    assert disk.size_bytes < LARGEST_BYTES
