"""A state directory under a node over a real file, which can be left as a kill would leave it."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import trio

from blockd.bitmap import Bits, DirtyBitmap
from blockd.block import FileDriver, Node
from blockd.state import StateDirectory
from blockd.state.database import Change, Database
from blockd.state.disk import Disk, HostDisk
from blockd.state.heartbeat import Clock
from blockd.state.host import Boot
from blockd.state.lock import DirectoryLock
from blockd.state.opened import Opened

SIZE = 256 * 1024 * 1024
GRANULE = 65536
REGION = 16 * 1024 * 1024
BOOT = Boot("boot", 0)
DATA = memoryview(b"x" * 512)


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    recovered: list[tuple[str, str | None]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    resumed: int = 0

    def bitmap_recovered(self, node: Node, bitmap: DirtyBitmap) -> None:
        self.recovered.append((bitmap.name, bitmap.reason and bitmap.reason.value))

    def storing_failed(self, node: Node, reason: str) -> None:
        self.failed.append(reason)

    def storing_resumed(self, node: Node) -> None:
        self.resumed += 1


def open_node(image: Path, *, name: str = "n") -> Node:
    # Without its lock: what comes after a "kill" must not wait for this one.
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    driver = FileDriver(fd, filename=str(image), read_only=False, unmap=True, flushes=True)
    return Node(name, driver)


def make_image(path: Path, size_bytes: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@dataclass
class Daemon:
    """What one daemon has: its state directory, and what that told."""

    state: StateDirectory
    heard: Heard
    path: Path
    image: Path
    _work: trio.Nursery
    _copies: count[int] = field(default_factory=count)

    async def node(self, image: Path | None = None, *, name: str = "n") -> Node:
        """A node over the image, with its bitmaps."""
        node = open_node(image or self.image, name=name)
        await self.state.attach(node)
        return node

    async def close(self, node: Node) -> None:
        async with self.state.closing(node):
            await node.driver.close()

    async def add(
        self, node: Node, name: str = "b", granularity_bytes: int = GRANULE
    ) -> DirtyBitmap:
        """A new bitmap that is kept."""
        bitmap = node.bitmaps.add(name, granularity_bytes)
        bitmap.persistent = True
        assert await self.state.keep(node)
        return bitmap

    async def checkpoint(self, node: Node) -> None:
        """What happens at intervals."""
        await self.state.store_all(node)

    async def at_rest(self) -> None:
        """Return once nothing goes on in the background but the beat."""
        while len(self._work.child_tasks) > 1:
            await trio.lowlevel.checkpoint()

    async def tick(self) -> None:
        """What happens every second."""
        self.state._heartbeat.beat()
        await self.state._watch.look([*self.state._attached.values()])

    def after_kill(self) -> Path:
        """The state directory as a kill at this instant leaves it."""
        copy = self.path.with_name(f"{self.path.name}-killed-{next(self._copies)}")
        shutil.copytree(self.path, copy)
        return copy


class Room:
    """To be asked before each transaction: there is room for it, or there is ``none``."""

    none = False

    def check(self) -> None:
        if self.none:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@asynccontextmanager
async def daemon(
    path: Path,
    image: Path,
    *,
    boot: Boot = BOOT,
    disk: Disk | None = None,
    before_commit: Callable[[], None] | None = None,
    clock: Clock = time.time_ns,
) -> AsyncIterator[Daemon]:
    """A daemon without the rest. At the end nodes that are still open are let go of.

    ``before_commit`` is called in the place of each transaction, and may raise.
    """
    os.makedirs(path, exist_ok=True)
    heard = Heard()
    async with trio.open_nursery() as nursery:
        disk = disk or HostDisk(str(path / "marks"))
        opened = Opened(str(path), disk, DirectoryLock(str(path)), clock)
        if before_commit is not None:
            _watch_commits(opened.database, before_commit)
        state = StateDirectory(nursery, heard, opened, boot, disk)
        await state.begin()
        yield Daemon(state, heard, path, image, nursery)
        await state.close()
        nursery.cancel_scope.cancel()


def _watch_commits(database: Database, before: Callable[[], None]) -> None:
    commit = database.commit

    def watched(changes: Sequence[Change]) -> None:
        before()
        commit(changes)

    setattr(database, "commit", watched)  # noqa: B010 - mypy takes no other way


def granules(bits: Bits) -> set[int]:
    size = bits.granularity_bytes
    return {
        granule
        for extent in bits.extents()
        for granule in range(extent.offset // size, -(-extent.end // size))
    }


def dirty(node: Node, name: str = "b") -> set[int]:
    return granules(node.bitmaps.get(name).copy_bits())
