"""NBD clients stay connected, and lose nothing, while overlays are put on their node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Node
from blockd.nbd.wire import Cmd
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.nbd_codec import Call
from tests.helpers.nbd_server import DISK_BYTES, RawClient, Rig, serving
from tests.helpers.watched_driver import WatchedDriver

PIECE = 512


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        yield rig
        await rig.server.close()
        while nodes := [node for node in rig.graph if not node.users]:
            await rig.graph.remove(nodes[0])


async def cover(rig: Rig, name: str, node: Node) -> Node:
    overlay = rig.graph.add(name, MemoryOverlay(DISK_BYTES, None), owned=True)
    async with rig.graph.places.quiesced([node]):
        rig.graph.places.put_over(overlay, node)
    return overlay


class Writer:
    """A client that writes at random, a few requests in flight, into a range of its own.

    ``content`` is what it was told is there.
    """

    def __init__(self, client: RawClient, start: int, seed: int) -> None:
        self.client = client
        self.start = start
        self.content = bytearray(64 * PIECE)
        self.stop = False
        self.batches = 0
        self._random = Random(seed)

    async def write(self) -> None:
        while not self.stop:
            pieces = self._random.sample(range(64), 8)
            data = [self._random.randbytes(PIECE) for _ in pieces]
            calls = [
                Call(Cmd.WRITE, self.start + piece * PIECE, data=each)
                for piece, each in zip(pieces, data, strict=True)
            ]
            assert await self.client.pipeline(calls) == [b""] * len(calls)
            for piece, each in zip(pieces, data, strict=True):
                self.content[piece * PIECE : (piece + 1) * PIECE] = each
            self.batches += 1

    async def wait(self, batches: int) -> None:
        """Return once it has written that many more."""
        until = self.batches + batches
        while self.batches < until:
            await trio.lowlevel.checkpoint()


async def read_all(node: Node, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    await node.read(offset, view)
    return bytes(view)


@pytest.mark.parametrize("inline", [True, False])
async def test_all_that_was_confirmed_is_there(rig: Rig, *, inline: bool) -> None:
    driver = WatchedDriver(DISK_BYTES)
    driver.nowait = lambda _: inline
    node = rig.node("disk", driver)
    rig.export(node)
    writers = [Writer(await rig.raw(), number * 65536, number) for number in range(3)]
    layers: list[tuple[Node, bytes]] = []
    async with trio.open_nursery() as nursery:
        for writer in writers:
            nursery.start_soon(writer.write)
        for number in range(10):
            await writers[number % 3].wait(2)
            below = node
            node = await cover(rig, f"o{number}", below)
            layers.append((below, await read_all(below, 0, 3 * 65536)))
        for writer in writers:
            await writer.wait(2)
            writer.stop = True
    for writer in writers:
        assert await read_all(node, writer.start, len(writer.content)) == writer.content
    for below, then in layers:
        assert await read_all(below, 0, 3 * 65536) == then
    assert [export.node for export in rig.server.exports()] == [node]


async def test_a_write_waits_until_its_node_is_there(rig: Rig) -> None:
    """It must not wait in the old node, whose place is taken meanwhile."""
    driver = WatchedDriver(DISK_BYTES)
    node = rig.node("disk", driver)
    rig.export(node)
    first, second = await rig.raw(), await rig.raw()
    async with trio.open_nursery() as nursery:
        with driver.hold("write") as held:
            await first.request(Call(Cmd.WRITE, 0, data=b"early"))
            await held.reached.wait()
            nursery.start_soon(cover, rig, "overlay", node)
            await wait_all_tasks_blocked()
            await second.request(Call(Cmd.WRITE, PIECE, data=b"late"))
            await second.request(Call(Cmd.WRITE_ZEROES, PIECE, PIECE))
            await second.request(Call(Cmd.TRIM, 2 * PIECE, PIECE))
            await wait_all_tasks_blocked()
            assert driver.seen == ["write"]
    assert await first.reply() == (1, 0)
    assert {await second.reply() for _ in range(3)} == {(1, 0), (2, 0), (3, 0)}
    assert driver.data[: 3 * PIECE].rstrip(b"\0") == b"early"
    overlay = rig.graph.get("overlay").driver
    assert isinstance(overlay, MemoryOverlay)
    assert overlay.held == {1, 2}


async def test_a_write_that_waited_goes_to_the_old_node_after_all(rig: Rig) -> None:
    driver = WatchedDriver(DISK_BYTES)
    node = rig.node("disk", driver)
    rig.export(node)
    client = await rig.raw()
    overlay = MemoryOverlay(DISK_BYTES, None)
    top = rig.graph.add("overlay", overlay, owned=True)
    async with rig.graph.places.quiesced([node]):
        await client.request(Call(Cmd.WRITE, 0, data=b"data"))
        await wait_all_tasks_blocked()
        undo = rig.graph.places.put_over(top, node)
        assert await client.read(0, 4) == bytes(4)
        undo()
    assert await client.reply() == (1, 0)
    assert driver.data[:4] == b"data"
    assert not overlay.held


async def test_a_large_write_goes_on_in_the_new_node(rig: Rig) -> None:
    """Its first part is in the old one, and is seen through the new one."""
    driver = WatchedDriver(DISK_BYTES)
    driver.nowait = lambda _: True
    node = rig.node("disk", driver)
    rig.export(node)
    client = await rig.raw()
    data = Random(1).randbytes(DISK_BYTES)
    head = Call(Cmd.WRITE, 0, data=data)
    async with trio.open_nursery() as nursery:
        with driver.hold("write"):
            driver.nowait = lambda _: not driver.seen
            nursery.start_soon(client.request, head)
            await driver.wait_seen("write", 2)
            nursery.start_soon(cover, rig, "overlay", node)
            await wait_all_tasks_blocked()
        assert await client.reply() == (1, 0)
    assert await read_all(rig.graph.get("overlay"), 0, DISK_BYTES) == data
    assert driver.counts["write"] == 2


async def test_reading_goes_on_while_the_graph_changes(rig: Rig) -> None:
    driver = WatchedDriver(b"disk".ljust(DISK_BYTES, b"\0"))
    node = rig.node("disk", driver)
    rig.export(node)
    client, writer = await rig.raw(), await rig.raw()
    async with trio.open_nursery() as nursery:
        with driver.hold("write") as held:
            await writer.request(Call(Cmd.WRITE, PIECE, data=b"data"))
            await held.reached.wait()
            nursery.start_soon(cover, rig, "overlay", node)
            await wait_all_tasks_blocked()
            assert await client.read(0, 4) == b"disk"
    assert await client.read(0, 4) == b"disk"
    assert await client.read(PIECE, 4) == b"data"
