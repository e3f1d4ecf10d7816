"""blockdev-snapshot: what it refuses, in which order, and what becomes of the node."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from blockd.block import Graph, RawDriver, Role
from blockd.errors import BlockdError
from tests.helpers.command_rig import CommandRig, command_rig
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

SIZE = 4096


@asynccontextmanager
async def rig() -> AsyncIterator[CommandRig]:
    """``disk`` with a node of its own below it, ``overlay``, and ``other``."""
    drivers = {
        "file": MemoryDriver(SIZE),
        "overlay": MemoryOverlay(SIZE, None),
        "other": MemoryDriver(SIZE),
    }
    drivers["file"].filename = "/file.img"
    async with command_rig(**drivers) as made:
        made.graph._owned.discard(made.nodes["file"])
        made.nodes["disk"] = made.graph.add("disk", RawDriver(made.nodes["file"]), owned=True)
        yield made


async def refusal(rig: CommandRig, node: str = "disk", overlay: str = "overlay") -> str:
    before = [(each.name, each.read_only, each.backing) for each in rig.graph]
    with pytest.raises(BlockdError) as raised:
        await rig.execute("blockdev-snapshot", node=node, overlay=overlay)
    assert [(each.name, each.read_only, each.backing) for each in rig.graph] == before
    return raised.value.message


def hold(graph: Graph, rig: CommandRig, name: str, role: Role, *, writes: bool) -> None:
    graph.hold(rig.nodes[name], "block job 'j'", role, writes=writes)


async def test_the_node_keeps_what_it_has() -> None:
    async with rig() as made:
        await made.write("disk", 0, 512)
        await made.execute("blockdev-snapshot", node="disk", overlay="overlay")
        await made.write("overlay", 512, 512)
        view = memoryview(bytearray(1024))
        await made.nodes["overlay"].read(0, view)
        assert bytes(view) == b"w" * 1024
        assert made.drivers["file"].data == b"w" * 512 + bytes(SIZE - 512)
        with pytest.raises(PermissionError):
            await made.write("disk", 0, 512)


async def test_the_node_and_what_was_made_for_it_become_read_only() -> None:
    async with rig() as made:
        await made.write("disk", 0, 512)
        await made.execute("blockdev-snapshot", node="disk", overlay="overlay")
        assert [made.nodes[name].read_only for name in ("disk", "file")] == [True, True]
        assert made.drivers["file"].durable[:512] == b"w" * 512
        assert not made.nodes["overlay"].read_only


async def test_it_stays_writable_for_one_who_writes() -> None:
    async with rig() as made:
        hold(made.graph, made, "disk", Role.SOURCE, writes=True)
        await made.execute("blockdev-snapshot", node="disk", overlay="overlay")
        assert not made.nodes["disk"].read_only


async def test_a_flush_of_the_overlay_covers_what_the_node_was_told() -> None:
    """The guest knows of one disk only."""
    async with rig() as made:
        file = made.drivers["file"]
        async with made.graph.places.quiesced([made.nodes["disk"]]):
            made.graph.places.put_over(made.nodes["overlay"], made.nodes["disk"])
        await made.write("file", 0, 512)
        file.fail("flush", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await made.nodes["overlay"].flush()
        await made.nodes["overlay"].flush()
        assert file.durable[:512] == b"w" * 512
        flushes = file.counts["flush"]
        await made.nodes["overlay"].flush()
        assert file.counts["flush"] == flushes


async def test_a_node_that_can_not_be_flushed_later_stays_writable() -> None:
    async with rig() as made:
        made.drivers["file"].fail("flush", errno.EIO, nth=2)
        await made.execute("blockdev-snapshot", node="disk", overlay="overlay")
        assert not made.nodes["disk"].read_only
        assert made.nodes["overlay"].backing is made.nodes["disk"]


async def test_refusals_in_their_order() -> None:
    async with rig() as made:
        nodes, graph = made.nodes, made.graph
        assert await refusal(made, "no", "nor") == "Cannot find device='no' nor node-name='no'"
        target = graph.hold(nodes["disk"], "block job 'j'", Role.TARGET, writes=True)
        assert await refusal(made, overlay="no") == (
            "Node 'disk' is busy: block device is in use by block job: backup"
        )
        target.release()
        made.drivers["file"].fail("flush", errno.EIO)
        assert await refusal(made, overlay="no") == "IO error has occurred"
        assert await refusal(made, overlay="no") == "Cannot find device='no' nor node-name='no'"
        export = graph.hold(nodes["other"], "an unnamed block device", writes=False)
        assert await refusal(made, overlay="other") == "The overlay is already in use"
        export.release()
        assert await refusal(made, overlay="other") == (
            "The overlay does not support backing images"
        )
        filled = graph.hold(nodes["overlay"], "block job 'j'", Role.TARGET, writes=True)
        assert await refusal(made) == (
            "Node 'overlay' is busy: block device is in use by block job: backup"
        )
        filled.release()
        above = graph.add("above", RawDriver(nodes["overlay"]), owned=True)
        assert await refusal(made, above.name) == (
            "Making 'above' a backing child of 'overlay' would create a cycle"
        )
        await made.execute("blockdev-snapshot", node="disk", overlay="overlay")
        assert await refusal(made, overlay="no") == (
            "Node 'disk' is busy: node is used as backing hd of 'overlay'"
        )
        assert await refusal(made, "other") == "The overlay already has a backing image"


async def test_a_command_that_is_cancelled_has_done_it_or_not() -> None:
    async with rig() as made:
        file = made.drivers["file"]
        with file.hold("flush") as held:
            async with trio.open_nursery() as nursery:

                async def snapshot() -> None:
                    await made.execute("blockdev-snapshot", node="disk", overlay="overlay")

                nursery.start_soon(snapshot)
                await held.reached.wait()
                nursery.cancel_scope.cancel()
        assert made.nodes["overlay"].backing is None
        await made.write("disk", 0, 512)
