"""A state directory whose disk is full, or fails, at any of its system calls and commits.

The guest must not notice; and whatever a kill or a power cut then leaves, the bitmaps have all that
they must: all dirty if need be.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import Heard, daemon, make_image
from tests.helpers.state_story import Story, World, pretend, reopen

#: Calls that take space, and fail where there is none.
TAKE_SPACE = frozenset({"create", "fallocate", "commit"})

#: Calls that fail where nothing may be changed any more, as after an error of the file system.
CHANGE = TAKE_SPACE | {"write", "truncate", "unlink"}


@dataclass
class Failure:
    """From the ``first`` call on, ``times`` calls fail, as far as they are ``of`` that kind."""

    first: int
    times: int
    error: int
    of: frozenset[str] | None = None
    calls: int = 0
    on: bool = False

    def strike(self, call: str = "commit") -> None:
        if not self.on or (self.of is not None and call not in self.of):
            return
        self.calls += 1
        if self.first <= self.calls < self.first + self.times:
            raise OSError(self.error, os.strerror(self.error))


@dataclass
class Run:
    """One run of the story with a failure in it."""

    world: World
    path: Path
    image: Path
    disk: SimulatedDisk
    heard: Heard


async def run(failure: Failure, path: Path, world: World) -> Run:
    path.mkdir()
    disk = SimulatedDisk()
    disk.before = failure.strike
    image = make_image(path / "disk.img")
    files = path / "state"
    strike, clock = failure.strike, world.clock
    async with daemon(files, image, disk=disk, before_commit=strike, clock=clock) as one:
        failure.on = True
        await Story(world, one, may_fail=True).run(close=False)
        failure.on = False
        # A second later, as long as the daemon lives.
        for keeper in one.state._attached.values():
            await keeper.losses.record()
        left = Run(world, files, image, disk, one.heard)
        await check(left)
    return left


async def check(left: Run) -> None:
    for power in (None, Random(1), Random(2)):
        found, _ = await reopen(left.world, left.path, left.disk, left.image, power=power)
        for name, granules in left.world.must.items():
            assert granules <= found[name]


async def sweep(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    times: int,
    error: int,
    of: frozenset[str] | None,
    step: int = 1,
) -> None:
    """The failure at every call that there is; or at one of so many."""
    first, told = 1, 0
    while True:
        world = World()
        pretend(world, monkeypatch)
        failure = Failure(first, times, error, of)
        left = await run(failure, path / str(first), world)
        if failure.calls < first:
            break
        told += bool(left.heard.failed)
        first += step
    assert told
    assert first > (20 if of else 100)


async def test_promise_5_an_error_at_any_call(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sweep(memory_path, monkeypatch, times=1, error=errno.EIO, of=None)


async def test_promise_5_errors_for_a_while(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sweep(memory_path, monkeypatch, times=8, error=errno.EIO, of=None)


async def test_promise_5_a_disk_that_is_full_from_any_call_on(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sweep(memory_path, monkeypatch, times=1 << 30, error=errno.ENOSPC, of=TAKE_SPACE)


async def test_promise_5_a_disk_that_is_read_only_from_any_call_on(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until somebody mounts it anew for the daemon, which lives."""
    await sweep(memory_path, monkeypatch, times=1 << 30, error=errno.EROFS, of=CHANGE, step=3)
