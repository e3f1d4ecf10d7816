"""Image fleecing as backup programs do it: nbdcopy reads the target, a guest hammers the disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from blockd.backup import (
    BackupJob,
    BackupRequest,
    CopyBeforeWriteDriver,
    Keeping,
    OnErrors,
    SnapshotAccessDriver,
    Sync,
    plan_backup,
)
from blockd.block import Node
from blockd.events import Bus
from blockd.job import Jobs
from tests.helpers.backup_rig import start_job
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_server import Rig, in_thread
from tests.helpers.tools import require_tool

MIB = 1024 * 1024
SIZE = 8 * MIB


class Fleecing:
    """A disk with a guest, and an overlay on it that takes the old data; both are exported."""

    def __init__(self, tasks: trio.Nursery, directory: Path) -> None:
        self.rig = Rig(tasks, directory / "nbd.sock")
        self.rig.graph.tasks = tasks
        self.jobs = Jobs(tasks, Bus())
        self.directory = directory
        self.disk_driver = MemoryDriver(random.Random(1).randbytes(SIZE))
        # Every third MiB is a hole.
        for start in range(0, SIZE, 3 * MIB):
            self.disk_driver.data[start : start + MIB] = bytes(MIB)
        self.disk = self.rig.graph.add("disk", self.disk_driver, owned=True)
        self.overlay = self.rig.graph.add("overlay", MemoryOverlay(SIZE, self.disk), owned=True)
        self.written = 0

    async def start_job(self) -> Node:
        plan = plan_backup(BackupRequest(Sync.NONE), self.disk, self.overlay)
        job = BackupJob("j", plan, self.disk, self.overlay, on_errors=OnErrors())
        await start_job(self.jobs, self.disk, job)
        return self.overlay

    async def put_filter_in(self) -> Node:
        driver = await CopyBeforeWriteDriver.open(
            self.rig.graph, "node 'filter'", self.disk, self.overlay, Keeping(), read_only=False
        )
        self.rig.graph.add("filter", driver, owned=True)
        return self.overlay

    async def put_access_in(self) -> Node:
        await self.put_filter_in()
        node = self.rig.graph.get("filter")
        access = SnapshotAccessDriver(node, read_only=True, unmap=False)
        return self.rig.graph.add("access", access, owned=True)

    def hammer(self, stop: trio.Event) -> None:
        """The guest, in a thread: writes, zeroes and trims all over the disk."""
        rng = random.Random(2)
        with NbdClient.open(self.rig.path, "disk") as guest:
            while not stop.is_set():
                offset = rng.randrange(SIZE // 512) * 512
                length = min(rng.choice([512, 4096, 300_000]), SIZE - offset)
                match rng.randrange(4):
                    case 0:
                        guest.write_zeroes(offset, length)
                    case 1:
                        guest.trim(offset, length)
                    case _:
                        guest.write(offset, rng.randbytes(length))
                self.written += 1
            guest.disconnect()

    async def copy(self, name: str) -> bytes:
        path = self.directory / "copy.img"
        address = f"nbd+unix:///{name}?socket={self.rig.path}"
        await trio.run_process([require_tool("nbdcopy"), address, str(path)])
        return path.read_bytes()


@pytest.fixture
async def fleecing(tmp_path: Path) -> AsyncIterator[Fleecing]:
    async with trio.open_nursery() as tasks:
        fleecing = Fleecing(tasks, tmp_path)
        await fleecing.rig.start()
        yield fleecing
        await fleecing.rig.close()
        for job in fleecing.jobs.newest_first():
            job.request_cancel()
            await job.wait_concluded()
        await fleecing.rig.graph.close()


@pytest.mark.parametrize(
    "begin", [Fleecing.start_job, Fleecing.put_filter_in, Fleecing.put_access_in]
)
async def test_what_is_copied_is_the_instant(
    fleecing: Fleecing, begin: Callable[[Fleecing], Awaitable[Node]]
) -> None:
    rig = fleecing.rig
    rig.export(fleecing.disk)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, lambda: fleecing.hammer(stop))
        while fleecing.written < 20:
            await trio.lowlevel.checkpoint()
        shown = await begin(fleecing)
        # There was no checkpoint since that instant.
        instant = bytes(fleecing.disk_driver.data)
        rig.export(shown, writable=False)
        for _ in range(3):
            before = fleecing.written
            while fleecing.written < before + 20:
                await trio.lowlevel.checkpoint()
            assert await fleecing.copy(shown.name) == instant
        stop.set()
    assert bytes(fleecing.disk_driver.data) != instant
