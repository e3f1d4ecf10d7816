"""Random programs of a guest and an administrator, with kills and power cuts in between.

The model is what the node itself has in memory: after a kill the next daemon must have the same,
bit by bit; after a power cut at least that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from blockd.bitmap import Freeze
from blockd.block import Node
from blockd.state.host import Boot
from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import DATA, GRANULE, SIZE, Daemon, daemon, make_image
from tests.helpers.state_story import World, copy_database, pretend

STEPS = 40
NAMES = ["a", "b", "c"]

State = dict[str, tuple[bool, frozenset[int]]]


def state_of(node: Node) -> State:
    """What a crash must give back: a frozen bitmap is reclaimed by it."""
    found = {}
    for bitmap in node.bitmaps.list():
        granules = {
            granule
            for window in range(bitmap.window_count)
            for granule in bitmap.window(window).to_array()
        }
        found[bitmap.name] = (bitmap.recording, frozenset(granules))
    return found


class Program:
    """One daemon's life."""

    def __init__(self, one: Daemon, node: Node, world: World, random: Random) -> None:
        self.one = one
        self.node = node
        self.world = world
        self.random = random
        self.freezes: list[Freeze] = []

    async def step(self) -> None:
        actions: list[Callable[[], object]] = [
            self.write, self.write, self.write, self.write_much, self.add, self.remove,
            self.clear, self.enable, self.disable, self.freeze, self.thaw, self.store, self.merge,
            self.rest,
        ]  # fmt: skip
        action = self.random.choice(actions)
        result = action()
        if hasattr(result, "__await__"):
            await result

    async def write(self) -> None:
        await self.node.write(self.random.randrange(SIZE // 512) * 512, DATA)
        self.world.changed += 1

    async def write_much(self) -> None:
        offset = self.random.randrange(SIZE // 2)
        await self.node.write_zeroes(offset, self.random.randrange(1, SIZE // 4), unmap=True)
        self.world.changed += 1

    async def add(self) -> None:
        name = self.random.choice(NAMES)
        if not self.node.bitmaps.has(name):
            granularity = self.random.choice([4096, GRANULE, 4 * GRANULE])
            self.node.bitmaps.add(name, granularity).persistent = True
            await self.keep()

    async def keep(self) -> None:
        assert await self.one.state.keep(self.node)

    async def change(self, what: str) -> None:
        free = [bitmap for bitmap in self.node.bitmaps.list() if not bitmap.busy]
        if free:
            getattr(self.random.choice(free), what)()
            await self.keep()

    async def clear(self) -> None:
        await self.change("clear")

    async def enable(self) -> None:
        await self.change("enable")

    async def disable(self) -> None:
        await self.change("disable")

    async def merge(self) -> None:
        free = [bitmap for bitmap in self.node.bitmaps.list() if not bitmap.busy]
        if free:
            self.random.choice(free).merge_from([free[0].usable_bits().copy()])
            await self.keep()

    async def remove(self) -> None:
        free = [bitmap for bitmap in self.node.bitmaps.list() if not bitmap.busy]
        if len(free) > 1:
            self.node.bitmaps.remove(self.random.choice(free).name)
            await self.keep()

    def freeze(self) -> None:
        free = [bitmap for bitmap in self.node.bitmaps.list() if not bitmap.busy]
        if free:
            self.freezes.append(self.random.choice(free).freeze("job"))

    async def thaw(self) -> None:
        if self.freezes:
            freeze = self.freezes.pop()
            if self.random.random() < 0.5:
                freeze.abdicate()
                await self.keep()
            else:
                freeze.reclaim()

    async def rest(self) -> None:
        """The node is read-only for a while."""
        self.node.read_only = True
        await self.one.state.settle(self.node)
        self.node.read_only = False
        if self.random.random() < 0.5:
            await self.keep()

    async def store(self) -> None:
        if self.one.state._attached:
            await self.one.checkpoint(self.node)


def check(found: State, wanted: State, *, exact: bool) -> None:
    assert found.keys() == wanted.keys()
    for name, (recording, granules) in wanted.items():
        assert found[name][0] == recording
        assert granules <= found[name][1]
        if exact:
            assert found[name][1] == granules


@pytest.mark.parametrize("seed", range(20))
async def test_promises_2_and_3_random_programs(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world, random = World(), Random(seed)
    pretend(world, monkeypatch)
    image = make_image(memory_path / "disk.img")
    path, disk, boot = memory_path / "0", SimulatedDisk(), Boot("0", 1 << 62)
    wanted: State = {}
    exact = True
    for life in range(6):
        ending = random.choice(["close", "kill", "kill", "power cut"])
        following = memory_path / str(life + 1)
        async with daemon(path, image, boot=boot, disk=disk, clock=world.clock) as one:
            node = await one.node()
            assert one.heard.recovered == []
            check(state_of(node), wanted, exact=exact)
            program = Program(one, node, world, random)
            for _ in range(random.randrange(STEPS)):
                await program.step()
            if ending == "close":
                while program.freezes:
                    program.freezes.pop().reclaim()
                await one.close(node)
            wanted = state_of(node)
            exact = ending != "power cut"
            if ending == "power cut":
                disk = disk.after_power_cut(random)
                boot = Boot(str(life + 1), 1 << 62)
            else:
                disk = disk.after_kill()
            copy_database(path, following)
        path = following
