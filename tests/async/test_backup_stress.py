"""Real files and real threads: guests write without a pause while one backup follows another."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.backup import BackupJob, BackupRequest, BitmapMode, OnErrors, Sync, plan_backup
from blockd.block import FileDriver, Node, WriteBy
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.errors import BlockdError, WouldBlock
from blockd.events import Bus
from blockd.job import Group, Jobs
from tests.helpers.qcow2 import check

#: The last cluster of 64 KiB is a partial one.
SIZE = 2 * limits.MIB - 4096
BACKUPS = 300
GUESTS = 4


class Disk(FileDriver):
    """A file that counts how many threads copied to it. Its flushes do nothing."""

    def __init__(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        descriptor = os.open(path, os.O_RDWR)
        super().__init__(descriptor, filename=str(path), read_only=False, unmap=True, flushes=False)
        self.sweeps = 0

    def content(self) -> bytes:
        return Path(self.filename).read_bytes()

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        self.sweeps += 1
        return await super().write_by(offset, length, call)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKUP_SWEEP_BYTES", 512 * limits.KIB)
    monkeypatch.setattr(limits, "BACKUP_SWEEP_BUSY_BYTES", 512 * limits.KIB)
    monkeypatch.setattr(limits, "BACKUP_STEP_BYTES", 128 * limits.KIB)
    monkeypatch.setattr(limits, "HELD_BYTES_LIMIT", 512 * limits.KIB)


async def guest(node: Node, seed: int) -> None:
    """Writes, zeroes and discards at random, for ever."""
    chance = random.Random(seed)
    data = memoryview(chance.randbytes(256 * limits.KIB))
    while True:
        length = chance.choice([512, 4096, 4096, 4096, 65536, 131072])
        offset = chance.randrange((SIZE - length) // 512 + 1) * 512
        start = chance.randrange(128 * limits.KIB)
        view = data[start : start + length]
        match chance.randrange(10):
            case 0:
                await node.discard(offset, length)
            case 1:
                await node.write_zeroes(offset, length, unmap=chance.random() < 0.5)
            case 2 | 3:
                await node.write(offset, view)
            case _:
                try:
                    node.write_nowait(offset, view)
                except WouldBlock:
                    await node.write(offset, view)
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def busy_guests(node: Node) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for seed in range(GUESTS):
            nursery.start_soon(guest, node, seed)
        yield
        nursery.cancel_scope.cancel()


def backup(source: Node, target: Node, *, full: bool) -> BackupJob:
    """Whether it succeeds or not, the bitmap then knows all that the target lacks."""
    sync = Sync.FULL if full else Sync.BITMAP
    plan = plan_backup(BackupRequest(sync, "b", BitmapMode.ALWAYS), source, target)
    return BackupJob("j", plan, source, target, on_errors=OnErrors())


async def cancel_after(job: BackupJob, turns: int) -> None:
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    with suppress(BlockdError):
        job.request_cancel()


async def make_target(file: Disk, driver: str) -> Node:
    node = Node("target", file)
    if driver == "file":
        return node
    await create_image(node, ImageOptions(SIZE))
    image = await open_image(node, await read_header(node))
    return Node("image", Qcow2Driver(image, direct=False, flushes=True, unmap=True))


async def content(node: Node) -> bytes:
    data = bytearray(SIZE)
    await node.read(0, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("driver", ["file", "qcow2"])
async def test_every_backup_is_the_disk_at_its_start(driver: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "source", random.Random(0).randbytes(SIZE))
    copy = Disk(tmp_path / "target", bytes(SIZE if driver == "file" else 0))
    source, target = Node("source", disk), await make_target(copy, driver)
    source.bitmaps.add("b", 64 * limits.KIB)
    chance = random.Random(0)
    cancelled = 0
    async with trio.open_nursery() as nursery, busy_guests(source):
        jobs = Jobs(nursery, Bus())
        for number in range(BACKUPS):
            job = backup(source, target, full=number % 10 == 0)
            async with source.quiesced():
                jobs.admit(job)
                jobs.begin([Group([job], source.quiesced)])
            # There was no checkpoint between the job's start and this.
            frozen = disk.content()
            if number % 5 == 4:
                await cancel_after(job, chance.randrange(40))
            await job.wait_concluded()
            if job.error is None:
                assert await content(target) == frozen
            else:
                assert job.cancelled
                cancelled += 1
    assert copy.sweeps > BACKUPS
    assert cancelled > BACKUPS / 20
    await disk.close()
    await target.close()
    if driver == "qcow2":
        await copy.close()
        check(tmp_path / "target")
