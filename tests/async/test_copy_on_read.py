"""``copy-on-read``: what is read once is asked of the backing file no more."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import CopyOnReadDriver, Graph, Node
from blockd.errors import BlockdError, WouldBlock
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

SIZE = 64 * 1024
OLD = bytes(range(256)) * (SIZE // 256)


class Chain:
    """The filter over an overlay over a backing file, both in memory."""

    def __init__(self, *, depth_max: int | None = None) -> None:
        self.backing = MemoryDriver(OLD)
        self.overlay = MemoryOverlay(SIZE, Node("backing", self.backing))
        self.driver = CopyOnReadDriver(Node("overlay", self.overlay), depth_max=depth_max)

    async def read(self, offset: int, length: int) -> bytes:
        view = memoryview(bytearray(length))
        await self.driver.read(offset, view)
        return bytes(view)

    async def depths(self) -> set[int]:
        return {run.depth for run in await self.overlay.allocation(0, SIZE)}


async def test_a_second_read_stays_above() -> None:
    chain = Chain()
    assert await chain.read(4096, 8192) == OLD[4096:12288]
    asked = chain.backing.counts["read"]
    assert await chain.read(4096, 8192) == OLD[4096:12288]
    assert chain.backing.counts["read"] == asked
    assert await chain.read(0, SIZE) == OLD
    assert await chain.depths() == {1}


async def test_not_below_the_bottom() -> None:
    chain = Chain(depth_max=1)
    assert await chain.read(0, SIZE) == OLD
    assert await chain.depths() == {2}


async def test_a_copy_never_overwrites_what_a_guest_writes() -> None:
    chain = Chain()
    with chain.backing.hold("read") as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chain.read, 0, SIZE)
            await hold.reached.wait()
            with pytest.raises(WouldBlock):
                chain.driver.write_nowait(512, memoryview(b"new!"))
            nursery.start_soon(chain.driver.write, 512, memoryview(b"new!"))
            nursery.start_soon(partial(chain.driver.write_zeroes, 1024, 512, unmap=False))
            nursery.start_soon(chain.driver.discard, 2048, 512)
            await wait_all_tasks_blocked()
            hold.release()
    assert await chain.read(512, 4) == b"new!"
    assert await chain.read(1024, 512) == bytes(512) == await chain.read(2048, 512)


def test_nobody_else_writes_to_what_it_copies_into() -> None:
    graph = Graph()
    child = graph.add("child", MemoryDriver(OLD), owned=True)
    graph.add("cor", CopyOnReadDriver(child), owned=True)
    with pytest.raises(BlockdError, match="Permission conflict on node 'child'"):
        graph.hold(child, "an unnamed block device", writes=True)
    cor = graph.get("cor")
    graph.hold(cor, "an unnamed block device", writes=True).release()


def test_what_is_read_only_is_refused() -> None:
    graph = Graph()
    child = graph.add("child", MemoryDriver(OLD, read_only=True), owned=True)
    with pytest.raises(BlockdError, match="Block node is read-only"):
        graph.add("cor", CopyOnReadDriver(child), owned=True)
    assert not child.users
