"""A guest and an administrator on a disk with persistent bitmaps, and what must be dirty when."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from blockd.block import Node
from blockd.state.host import Boot
from blockd.state.records import Identity
from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import DATA, GRANULE, REGION, Daemon, Heard, daemon, dirty

#: Calls that change nothing, so that nothing new can be left before the next.
PASSIVE = {"read", "open", "names", "close", "end"}


@dataclass
class World:
    """The image, as the host describes it, and what a bitmap must have at this instant.

    ``changed``: when the image was, which is what the clock says, too.
    ``must``: granules by bitmap, of those that are there for sure. ``exact``: nothing but guest
    writes is going on, so that this is all. ``written``: the regions that were ever written to.
    ``about``: where a write is under way, which may be marked already.
    """

    changed: int = 10**18
    must: dict[str, set[int]] = field(default_factory=dict)
    exact: bool = False
    written: set[int] = field(default_factory=set)
    about: int | None = None

    def clock(self) -> int:
        return self.changed

    def identify(self, fd: int) -> Identity:
        return Identity(1, 1, size_bytes=1, changed_ns=self.changed, inode_changed_ns=self.changed)


def pretend(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store believe what ``world`` says of the image."""
    for module in ("directory", "places", "epochs", "watch"):
        monkeypatch.setattr(f"blockd.state.{module}.identify", world.identify)


class Story:
    """A guest and an administrator, and what follows from what they do."""

    def __init__(self, world: World, one: Daemon, *, may_fail: bool = False) -> None:
        self.world = world
        self.may_fail = may_fail
        self.one = one
        self.node: Node

    async def write(self, offset: int) -> None:
        world = self.world
        world.written.add(offset // REGION)
        world.about = offset
        await self.node.write(offset, DATA)
        world.about = None
        # From the note on it may be on the disk.
        world.changed += 1
        for bitmap in self.node.bitmaps.list():
            if bitmap.recording and bitmap.name in world.must:
                world.must[bitmap.name].add(offset // bitmap.granularity_bytes)

    async def checkpoint(self) -> None:
        try:
            await self.one.checkpoint(self.node)
        except OSError:
            assert self.may_fail

    async def keep(self) -> None:
        """Until it is durable, either is right."""
        self.world.exact = False
        before = set(self.world.must)
        for bitmap in self.node.bitmaps.list():
            now = dirty(self.node, bitmap.name)
            if bitmap.name in self.world.must:
                self.world.must[bitmap.name] &= now
        kept = await self.one.state.keep(self.node)
        assert kept or self.may_fail
        there = {
            bitmap.name for bitmap in self.node.bitmaps.list() if kept or bitmap.name in before
        }
        self.world.must = {name: dirty(self.node, name) for name in there}
        self.world.exact = True

    async def run(self, *, close: bool = True) -> None:
        """``close`` False: the end comes with the node open."""
        world = self.world
        self.node = await self.one.node()
        bitmaps = self.node.bitmaps
        bitmaps.add("a", GRANULE).persistent = True
        await self.keep()
        await self.write(0)
        await self.write(GRANULE)
        await self.write(3 * REGION)
        bitmaps.add("b", 4 * GRANULE).persistent = True
        await self.keep()
        await self.write(5 * REGION)
        await self.checkpoint()
        await self.write(5 * REGION + GRANULE)
        await self.checkpoint()
        freeze = bitmaps.get("a").freeze("job")
        await self.write(7 * REGION)
        await self.write(0)
        freeze.abdicate()
        await self.keep()
        bitmaps.get("b").disable()
        await self.keep()
        await self.write(9 * REGION)
        bitmaps.get("b").enable()
        await self.keep()
        await self.write(9 * REGION + GRANULE)
        await self.one.close(self.node)
        self.node = await self.one.node()
        await self.write(11 * REGION)
        bitmaps = self.node.bitmaps
        if len(bitmaps.list()) < 2:
            # They were never stored.
            assert self.may_fail
            assert len(world.must) < 2
            return
        world.exact = False
        world.must.pop("b", None)
        bitmaps.remove("b")
        await self.keep()
        await self.write(13 * REGION)
        bitmaps.get("a").clear()
        await self.keep()
        await self.write(2 * REGION)
        self.node.read_only = True
        await self.one.state.settle(self.node)
        self.node.read_only = False
        await self.write(4 * REGION)
        if close:
            await self.one.close(self.node)


async def reopen(
    world: World, files: Path, disk: SimulatedDisk, image: Path, *, power: Random | None
) -> tuple[dict[str, set[int]], Heard]:
    """The bitmaps that the next daemon has, after a kill or else a power cut."""
    left = disk.after_kill() if power is None else disk.after_power_cut(power)
    path = files.with_name("reopened")
    shutil.rmtree(path, ignore_errors=True)
    copy_database(files, path)
    # Nothing writes to the image between the cut and the boot.
    boot = Boot("boot", 0) if power is None else Boot("next", 1 << 62)
    async with daemon(path, image, boot=boot, disk=left, clock=world.clock) as two:
        node = await two.node()
        found = {bitmap.name: dirty(node, bitmap.name) for bitmap in node.bitmaps.list()}
        await node.driver.close()
    return found, two.heard


def copy_database(path: Path, to: Path) -> None:
    """Between transactions, or after a kill, these two are all of it."""
    to.mkdir()
    for name in ("state.db", "state.db-wal"):
        if (path / name).exists():
            shutil.copy(path / name, to / name)
