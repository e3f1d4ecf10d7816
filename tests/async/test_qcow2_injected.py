"""Errors injected into qcow2 at each of the events that QEMU's ``blkdebug`` knows of there."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import BlkdebugDriver, Driver, InjectError, Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.qcow2 import check, qemu_img_check

CLUSTER = 512
#: So an L2 table reaches over 32 KiB, as does a refcount block; all of them must grow.
SIZE = 192 * limits.KIB
GROWN = 3 * limits.MIB
EVENTS = [
    "cluster_alloc",
    "cluster_free",
    "cow_read",
    "cow_write",
    "flush_to_os",
    "l1_grow_activate_table",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_update",
    "l2_alloc_write",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_switch_table",
    "refblock_alloc_write_table",
    "refblock_load",
    "refblock_update_part",
    "reftable_load",
    "write_aio",
    "write_compressed",
]
#: What comes next there is a discard, and a cluster that is not discarded is free all the same.
UNTOLD = {"cluster_free"}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", 64 * limits.KIB)
    monkeypatch.setattr(limits, "QCOW2_DISCARD_BYTES", CLUSTER)


class Disk:
    """An image over a backing file, and what a guest must find in it."""

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.storage = MemoryDriver(0)
        self.below = Node("below", MemoryDriver(self.rng.randbytes(SIZE // 2)))
        self.model = bytearray(SIZE)
        #: Clusters of which a change failed: any of it may be there.
        self.unknown: set[int] = set()
        self.errors: set[int] = set()

    async def create(self) -> None:
        await self.below.read(0, memoryview(self.model)[: SIZE // 2])
        new = Node("new", self.storage)
        await create_image(new, ImageOptions(SIZE, cluster_size_bytes=CLUSTER, refcount_bits=64))
        await self.open(self.storage)
        for offset in range(0, SIZE, 32 * limits.KIB):
            await self.write(offset, 4 * CLUSTER)
            await self.compress(offset + 8 * CLUSTER)
        await self.driver.close()
        assert not self.errors

    async def open(self, below: Driver) -> None:
        file, backing = Node("file", below), self.below
        header = await read_header(file)
        image = await open_image(file, header, backing=backing, discard_freed=True)
        self.driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)

    async def attempt(self, call: Awaitable[object]) -> bool:
        try:
            await call
        except OSError as error:
            self.errors.add(error.errno or 0)
            return False
        return True

    async def change(self, offset: int, data: bytes, call: Awaitable[object]) -> None:
        end = offset + len(data)
        self.model[offset:end] = data
        if not await self.attempt(call):
            self.unknown |= set(range(offset // CLUSTER, -(-end // CLUSTER)))

    async def write(self, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)
        await self.change(offset, data, self.driver.write(offset, memoryview(data)))

    async def compress(self, offset: int) -> None:
        data = self.rng.randbytes(1) * CLUSTER
        await self.change(offset, data, self.driver.write_compressed(offset, memoryview(data)))

    async def work(self) -> None:
        """Something of every kind, so that each event comes up."""
        for offset in range(0, SIZE, 16 * limits.KIB):
            await self.write(offset + 100, 1000)
            await self.write(offset + 12 * CLUSTER, 3 * CLUSTER)
            await self.compress(offset + 20 * CLUSTER)
            zeroes = bytes(4 * CLUSTER)
            zeroing = self.driver.write_zeroes(offset, len(zeroes), unmap=True)
            await self.change(offset, zeroes, zeroing)
            await self.attempt(self.driver.flush())
            await self.check_content()
        if await self.attempt(self.driver.truncate(GROWN)):
            self.model.extend(bytes(GROWN - len(self.model)))
            await self.write(GROWN - 96 * limits.KIB, 96 * limits.KIB)
            await self.attempt(self.driver.flush())
            await self.write(GROWN // 4, 2 * limits.MIB)
        await self.attempt(self.driver.flush())
        await self.check_content()

    async def check_content(self) -> None:
        for offset in range(0, min(len(self.model), SIZE), CLUSTER):
            now = bytearray(CLUSTER)
            read = await self.attempt(self.driver.read(offset, memoryview(now)))
            if read and offset // CLUSTER not in self.unknown:
                assert now == self.model[offset : offset + CLUSTER]

    async def mend(self) -> None:
        """Write again what failed."""
        for cluster in sorted(self.unknown):
            await self.write(cluster * CLUSTER, CLUSTER)
        self.unknown.clear()


@pytest.mark.parametrize("event", EVENTS)
async def test_one_error_reaches_the_guest_and_does_no_other_harm(
    event: str, tmp_path: Path
) -> None:
    disk = Disk()
    await disk.create()
    rules = [InjectError(event, errno=errno.ENOSPC, once=True, immediately=True)]
    debug = BlkdebugDriver(Node("storage", disk.storage), errors=rules)
    await disk.attempt(disk.open(debug))
    if disk.errors:
        await disk.open(debug)
    await disk.work()
    assert disk.errors == ({errno.ENOSPC} if event not in UNTOLD else set())
    disk.errors.clear()
    await disk.mend()
    await disk.check_content()
    await disk.driver.close()
    assert not disk.errors
    image = tmp_path / "image"
    image.write_bytes(disk.storage.data)
    check(image)


@pytest.mark.parametrize("event", EVENTS)
async def test_storage_that_fails_for_good_corrupts_nothing(event: str, tmp_path: Path) -> None:
    disk = Disk()
    await disk.create()
    rules = [InjectError(event, errno=errno.EIO, immediately=True)]
    debug = BlkdebugDriver(Node("storage", disk.storage), errors=rules)
    if await disk.attempt(disk.open(debug)):
        await disk.work()
        await disk.attempt(disk.driver.close())
    assert errno.EIO in disk.errors or event in UNTOLD
    image = tmp_path / "image"
    image.write_bytes(disk.storage.data)
    assert not qemu_img_check(image)["corruptions"]
