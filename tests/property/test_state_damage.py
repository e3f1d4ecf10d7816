"""Damage anywhere in a state directory: no bitmap is lost, and none has a bit too few."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from blockd.state import marks
from blockd.state.host import Boot
from tests.helpers.state_rig import BOOT, DATA, GRANULE, REGION, Daemon, daemon, dirty, make_image
from tests.helpers.state_story import World, pretend

MUST = {"a": {0, 1, REGION // GRANULE, 5 * REGION // GRANULE}, "b": {0, REGION // GRANULE // 4}}
EXAMPLES = 60


def flip(data: bytearray, random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def zero_block(data: bytearray, random: Random) -> None:
    at = random.randrange(0, len(data), 512)
    data[at : at + 512] = bytes(len(data[at : at + 512]))


def scramble(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    data[at : at + 64] = random.randbytes(len(data[at : at + 64]))


def cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def empty(data: bytearray, random: Random) -> None:
    data.clear()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    pretend(world, monkeypatch)
    return world


@pytest.fixture
async def closed(world: World, memory_path: Path) -> Path:
    """A state directory that was closed, with two bitmaps of an image that was closed, too."""
    path = memory_path / "closed"
    async with daemon(path, make_image(memory_path / "disk.img")) as one:
        await fill(one)
        await one.close(next(iter(one.state._attached)))
    return path


@pytest.fixture
async def killed(world: World, memory_path: Path) -> Path:
    """The same, but of a daemon that was killed."""
    path = memory_path / "running"
    async with daemon(path, make_image(memory_path / "disk.img")) as one:
        await fill(one)
        path = one.after_kill()
    # What a kill leaves in the log belongs into the database, which is the one to be damaged.
    database = sqlite3.connect(path / "state.db")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


async def fill(one: Daemon) -> None:
    node = await one.node()
    await one.add(node, "a")
    await one.add(node, "b", 4 * GRANULE)
    await node.write(0, DATA)
    await node.write(REGION, DATA)
    await one.checkpoint(node)
    node.bitmaps.get("b").disable()
    await one.state.keep(node)
    await node.write(GRANULE, DATA)
    await node.write(5 * REGION, DATA)


async def check(path: Path, boot: Boot = BOOT) -> None:
    async with daemon(path, path.with_name("disk.img"), boot=boot) as two:
        node = await two.node()
        for name, granules in MUST.items():
            assert granules <= dirty(node, name)
        await node.driver.close()


async def sweep(
    base: Path,
    name: str,
    damage: Callable[[bytearray, Random], None],
    boot: Boot = BOOT,
    *,
    examples: int = EXAMPLES,
) -> None:
    for seed in range(examples):
        path = base.with_name("damaged")
        shutil.copytree(base, path)
        file = next(path.glob(name))
        data = bytearray(file.read_bytes())
        damage(data, random.Random(seed))
        file.write_bytes(data)
        await check(path, boot)
        shutil.rmtree(path)


each_damage = pytest.mark.parametrize("damage", [flip, zero_block, scramble, cut, empty])


@each_damage
async def test_the_database_of_a_closed_image(
    closed: Path, damage: Callable[[bytearray, Random], None]
) -> None:
    await sweep(closed, "state.db", damage)


@each_damage
@pytest.mark.parametrize("boot", [BOOT, Boot("next", 1 << 62)], ids=["kill", "power cut"])
async def test_the_database_of_an_open_image(
    killed: Path, damage: Callable[[bytearray, Random], None], boot: Boot
) -> None:
    await sweep(killed, "state.db", damage, boot)


@each_damage
async def test_the_marks_of_an_open_image(
    killed: Path, damage: Callable[[bytearray, Random], None]
) -> None:
    await sweep(killed, "marks/1.*", damage)


async def test_marks_that_are_all_zeroes(killed: Path) -> None:
    """They do not look as if nothing had been written."""

    def damage(data: bytearray, random: Random) -> None:
        head_and_poison = 2 * marks.BLOCK_BYTES
        assert any(data[head_and_poison:])
        data[head_and_poison:] = bytes(len(data) - head_and_poison)

    await sweep(killed, "marks/1.*", damage, examples=1)
