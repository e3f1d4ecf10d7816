"""A state directory that is cut off at any of its system calls and commits, by a kill or the power.

One story of a guest and an administrator runs on a simulated disk. Before each call what would be
left is set aside, with what must be dirty then; each time another daemon opens that. SQLite's own
files are taken as they are between its transactions, and with its log cut off inside each of them;
these are atomic and durable by its own care (``test_state_kills`` has the real thing).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import GRANULE, REGION, daemon, make_image
from tests.helpers.state_story import PASSIVE, Story, World, copy_database, pretend, reopen

POWER_CUTS = 2
#: All that changes what is left. Each checkpoint ends with a flip, which is a commit.
CALLS = {"create", "fallocate", "write", "sync", "sync_names", "truncate", "unlink", "commit"}


@dataclass
class Cut:
    """What is left, and what must be dirty."""

    call: str
    files: Path
    disk: SimulatedDisk
    must: dict[str, set[int]]
    exact: bool
    written: set[int]
    about: int | None
    changed: int

    def within(self, after: Cut, random: Random) -> Cut | None:
        """In the middle of the transaction between this and ``after``, if that is in the log."""
        logs = [each.files / "state.db-wal" for each in (self, after)]
        start, end = (log.stat().st_size if log.exists() else 0 for log in logs)
        data = self.files / "state.db"
        if start >= end or data.read_bytes() != (after.files / "state.db").read_bytes():
            return None
        files = self.files.with_name(f"{self.files.name}-torn")
        copy_database(after.files, files)
        os.truncate(files / "state.db-wal", random.randrange(start, end))
        return replace(self, call="inside a commit", files=files, exact=False)


@dataclass
class Recorder:
    """Sets aside what is left, before each call."""

    path: Path
    world: World
    disk: SimulatedDisk
    cuts: list[Cut] = field(default_factory=list)

    def cut(self, call: str) -> None:
        if call in PASSIVE:
            return
        files = self.path.with_name(f"cut-{len(self.cuts)}")
        copy_database(self.path, files)
        world = self.world
        must = {name: set(granules) for name, granules in world.must.items()}
        disk = SimulatedDisk()
        disk.now, disk.durable = deepcopy((self.disk.now, self.disk.durable))
        written = set(world.written)
        cut = Cut(call, files, disk, must, world.exact, written, world.about, world.changed)
        self.cuts.append(cut)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    pretend(world, monkeypatch)
    return world


@pytest.fixture
async def cuts(world: World, memory_path: Path) -> list[Cut]:
    disk = SimulatedDisk()
    recorder = Recorder(memory_path / "state", world, disk)
    disk.before = recorder.cut
    image = make_image(memory_path / "disk.img")

    def before_commit() -> None:
        recorder.cut("commit")

    path, clock = memory_path / "state", world.clock
    async with daemon(path, image, disk=disk, before_commit=before_commit, clock=clock) as one:
        await Story(world, one).run()
    recorder.cut("the end")
    assert {cut.call for cut in recorder.cuts} == CALLS | {"the end"}
    random = Random(1)
    pairs = pairwise(recorder.cuts)
    torn = [cut.within(after, random) for cut, after in pairs if cut.call == "commit"]
    inside = [cut for cut in torn if cut is not None]
    assert len(inside) > 20
    return recorder.cuts + inside


async def recovered(cut: Cut, world: World, *, power: Random | None) -> dict[str, set[int]]:
    """The bitmaps that the next daemon has, none of them with a reason."""
    world.changed = cut.changed
    image = cut.files.with_name("disk.img")
    found, heard = await reopen(world, cut.files, cut.disk, image, power=power)
    assert heard.recovered == [], cut.call
    return found


def each(cuts: list[Cut]) -> Iterator[Cut]:
    for number, cut in enumerate(cuts):
        cut.call = f"before call {number}: {cut.call}"
        yield cut


async def test_promise_2_after_a_kill_at_any_call_nothing_is_lost(
    cuts: list[Cut], world: World
) -> None:
    for cut in each(cuts):
        found = await recovered(cut, world, power=None)
        for name, granules in cut.must.items():
            assert granules <= found[name], cut.call
            if cut.exact:
                size = 4 * GRANULE if name == "b" else GRANULE
                about = set() if cut.about is None else {cut.about // size}
                assert found[name] <= granules | about, cut.call


async def test_promise_3_after_a_power_cut_at_any_call_no_more_is_dirty_than_was_armed(
    cuts: list[Cut], world: World
) -> None:
    for cut in each(cuts):
        for seed in range(POWER_CUTS):
            found = await recovered(cut, world, power=Random(seed))
            for name, granules in cut.must.items():
                assert granules <= found[name], cut.call
                size = 4 * GRANULE if name == "b" else GRANULE
                assert {granule * size // REGION for granule in found[name]} <= cut.written
