"""Writes to a qcow2 image that find or make their clusters at once."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.errors import WouldBlock
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.qcow2 import check

CLUSTER = 4096
SIZE = 64 * CLUSTER


class Image:
    """An image in memory, in whose first cluster there is something."""

    def __init__(self) -> None:
        self.storage = MemoryDriver(0)
        self.file = Node("file", self.storage)
        self.model = bytearray(SIZE)

    async def open(self, backing: Node | None = None) -> None:
        await create_image(self.file, ImageOptions(SIZE, cluster_size_bytes=CLUSTER))
        image = await open_image(self.file, await read_header(self.file), backing=backing)
        self.driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
        # From here on there is an L2 table, and room in the file.
        await self.driver.write(0, memoryview(b"first"))
        self.storage.nowait = lambda _: True

    def write(self, offset: int, data: bytes) -> None:
        self.driver.write_nowait(offset, memoryview(data))
        self.model[offset : offset + len(data)] = data

    async def check(self, path: Path) -> None:
        now = bytearray(SIZE)
        await self.driver.read(0, memoryview(now))
        self.model[:5] = b"first"
        assert now == self.model
        await self.driver.close()
        path.write_bytes(self.storage.data)
        check(path)


@pytest.fixture
def image() -> Image:
    return Image()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (CLUSTER, CLUSTER),
        (3 * CLUSTER, 5 * CLUSTER),
        (CLUSTER + 100, 50),
        (2 * CLUSTER - 10, 2 * CLUSTER),
        (SIZE - 5, 5),
    ],
)
async def test_new_clusters_are_written_at_once(
    offset: int, length: int, image: Image, tmp_path: Path
) -> None:
    await image.open()
    writes = image.storage.counts["write"]
    image.write(offset, b"n" * length)
    assert image.storage.counts["write"] == writes + 1
    image.write(offset, b"o" * length)
    await image.check(tmp_path / "image")


async def test_storage_that_is_not_written_to_at_once_costs_no_cluster(
    image: Image, tmp_path: Path
) -> None:
    await image.open()
    image.storage.nowait = lambda _: False
    for _ in range(3):
        with pytest.raises(WouldBlock):
            image.driver.write_nowait(CLUSTER, memoryview(bytes(CLUSTER)))
    image.storage.nowait = lambda _: True
    image.write(8 * CLUSTER, b"n" * 100)
    # The cluster is still one of zeroes, or all of it would have been written.
    await image.check(tmp_path / "image")


async def test_a_write_that_fails_gives_its_clusters_back(image: Image, tmp_path: Path) -> None:
    await image.open()
    image.storage.fail("write", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        image.driver.write_nowait(CLUSTER, memoryview(b"n" * 2 * CLUSTER))
    # What the failed write left in its clusters must not be seen around a smaller one.
    image.write(CLUSTER + 10, b"again")
    await image.check(tmp_path / "image")


async def test_what_must_be_read_is_not_done_at_once(image: Image, tmp_path: Path) -> None:
    below = Node("below", MemoryDriver(b"b" * (10 * CLUSTER)))
    await image.open(below)
    image.model[: 10 * CLUSTER] = b"b" * (10 * CLUSTER)
    with pytest.raises(WouldBlock):
        image.driver.write_nowait(CLUSTER + 100, memoryview(b"n"))
    image.write(CLUSTER, b"n" * CLUSTER)
    image.write(20 * CLUSTER + 100, b"n")
    await image.check(tmp_path / "image")
