"""An image whose node becomes read-only: nothing of it is left behind, or it goes on as before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.block.qcow2.features import Incompatible
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.qcow2 import check

CLUSTER = 4096
SIZE = 64 * CLUSTER
DATA = b"d" * CLUSTER


class Disk:
    """An image in memory, and a node over it."""

    def __init__(self) -> None:
        self.storage = MemoryDriver(0)
        self.file = Node("file", self.storage)

    async def make(self) -> Node:
        await create_image(self.file, ImageOptions(SIZE, cluster_size_bytes=CLUSTER))
        image = await open_image(self.file, await read_header(self.file))
        return Node("disk", Qcow2Driver(image, direct=False, flushes=True, unmap=True))

    async def is_dirty(self) -> bool:
        return bool((await read_header(self.file)).incompatible & Incompatible.DIRTY)

    def check(self, path: Path) -> None:
        path.write_bytes(self.storage.data)
        check(path)


async def test_it_waits_for_those_who_read_what_is_to_be_given_back(tmp_path: Path) -> None:
    disk = Disk()
    node = await disk.make()
    await node.write(0, memoryview(DATA))
    async with trio.open_nursery() as nursery:
        with disk.storage.hold("read") as hold:
            nursery.start_soon(node.read, 0, memoryview(bytearray(CLUSTER)))
            await hold.reached.wait()
            await node.discard(0, CLUSTER)
            nursery.start_soon(node.make_read_only)
            await wait_all_tasks_blocked()
            assert not node.read_only
    assert node.read_only
    assert not await disk.is_dirty()
    disk.check(tmp_path / "image")


async def test_where_that_fails_the_next_change_is_marked_again() -> None:
    for nth in range(1, 20):
        disk = Disk()
        node = await disk.make()
        await node.write(0, memoryview(DATA))
        disk.storage.fail("flush", errno.EIO, nth=nth)
        try:
            await node.make_read_only()
        except OSError:
            await node.write(CLUSTER, memoryview(DATA))
            await node.flush()
            assert await disk.is_dirty()
        else:
            break
    else:
        pytest.fail("it never became read-only")
