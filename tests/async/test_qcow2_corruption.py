"""What a damaged image still is good for, and that it is told of once."""

from __future__ import annotations

import errno

import pytest

from blockd import limits
from blockd.block import Graph
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.block.qcow2.header import Header
from blockd.events import Bus, Event
from tests.helpers.memory_driver import MemoryDriver

CLUSTER = 64 * limits.KIB
SIZE = 16 * CLUSTER


class Rig:
    """An image in memory with its first half written, and the events that it causes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        bus = Bus()
        bus.subscribe(self.events.append)
        self.graph = Graph(bus=bus)
        self.storage = MemoryDriver(0)
        self.storage.filename = "/image"
        self.file = self.graph.add("file", self.storage, owned=True)

    async def open(self) -> Qcow2Driver:
        image = await open_image(self.file, await read_header(self.file))
        driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
        self.node = self.graph.add("disk", driver, owned=True)
        return driver

    async def make(self) -> None:
        await create_image(self.file, ImageOptions(SIZE))
        await self.open()
        # The second write's data is behind all tables.
        for offset, length in ((0, CLUSTER), (CLUSTER, SIZE // 2 - CLUSTER)):
            await self.node.write(offset, memoryview(b"d" * length))
        await self.graph.remove(self.node)

    def lose_refcounts(self, header: Header) -> None:
        """Every cluster of the image counts as free."""
        at = header.refcount_table_offset
        block = int.from_bytes(self.storage.data[at : at + 8], "big")
        self.storage.data[block : block + CLUSTER] = bytes(CLUSTER)

    async def read(self, offset: int) -> bytes:
        view = memoryview(bytearray(512))
        await self.node.read(offset, view)
        return bytes(view)


async def test_a_file_that_was_cut_off_loses_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", CLUSTER)
    rig = Rig()
    await rig.make()
    await rig.file.resize(rig.file.size_bytes - CLUSTER)
    await rig.open()
    for _ in range(2):
        with pytest.raises(OSError, match="beyond the end of the file"):
            await rig.read(SIZE // 2 - 512)
        assert await rig.read(0) == b"d" * 512
    await rig.node.write(SIZE // 2, memoryview(b"w" * 512))
    [event] = rig.events
    assert event.name == "BLOCK_IMAGE_CORRUPTED"
    assert event.data["node-name"] == "disk"
    assert not event.data["fatal"]
    assert not (await read_header(rig.file)).corrupt


async def test_where_it_can_not_be_marked_it_is_used_no_more_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", CLUSTER)
    rig = Rig()
    await rig.make()
    header = await read_header(rig.file)
    rig.storage.data[header.l1_table_offset + 6] |= 512 >> 8
    await rig.open()
    rig.storage.fail("write", errno.EIO, times=100)
    rig.storage.fail("write_nowait", errno.EIO, times=100)
    with pytest.raises(OSError, match="is not aligned"):
        await rig.read(0)
    [event] = rig.events
    assert event.data["fatal"]
    for offset in (0, SIZE // 2):
        with pytest.raises(OSError, match="Input/output error"):
            await rig.read(offset)
        with pytest.raises(OSError, match="Input/output error"):
            await rig.node.write(offset, memoryview(b"w" * 512))
    assert rig.events == [event]


async def test_damage_that_is_met_when_bitmaps_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", CLUSTER)
    rig = Rig()
    await rig.make()
    rig.lose_refcounts(await read_header(rig.file))
    await rig.open()
    await rig.node.keeper.load(read_only=False)
    rig.node.bitmaps.add("b", CLUSTER).persistent = True
    with pytest.raises(OSError, match="refcount of a cluster with metadata is 0"):
        await rig.graph.remove(rig.node)
    [event] = rig.events
    assert event.data["fatal"]
    assert (await read_header(rig.file)).corrupt


async def test_damage_that_is_met_at_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", CLUSTER)
    rig = Rig()
    await rig.make()
    await rig.open()
    # The flush that comes first is itself a request, so the cluster is freed at the close.
    await rig.node.discard(0, CLUSTER)
    rig.lose_refcounts(await read_header(rig.file))
    await rig.graph.remove(rig.node)
    [event] = rig.events
    assert event.data["fatal"]
    assert (await read_header(rig.file)).corrupt
