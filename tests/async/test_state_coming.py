"""A persistent bitmap that is about to be added: no crash takes one away that was."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockd.block import Coming
from tests.helpers.state_rig import (
    DATA,
    GRANULE,
    SIZE,
    Daemon,
    Room,
    daemon,
    dirty,
    make_image,
)

ALL = set(range(SIZE // GRANULE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.raw")


@pytest.mark.parametrize("first", [True, False])
async def test_what_could_not_be_stored_after_all_comes_back_all_dirty(
    path: Path, image: Path, *, first: bool
) -> None:
    room = Room()
    async with daemon(path, image, before_commit=room.check) as before:
        node = await before.node()
        if not first:
            await before.add(node, "old")
        coming = Coming("b", GRANULE)
        assert await before.state.expect(node, coming)
        node.bitmaps.add("b", GRANULE).persistent = True
        room.none = True
        coming.over = True
        assert not await before.state.keep(node)
        assert before.heard.failed
        killed = before.after_kill()
        room.none = False
        await before.checkpoint(node)
        safe = before.after_kill()
    async with daemon(killed, image) as after:
        node = await after.node()
        assert dirty(node) == ALL
        assert ("b", "state-damaged") in after.heard.recovered
        assert node.bitmaps.get("b").recording
    async with daemon(safe, image) as after:
        assert dirty(await after.node()) == set()
        assert after.heard.recovered == []


async def names(killed: Path, before: Daemon) -> list[str]:
    """Of the bitmaps after a kill, none of which has come to harm."""
    async with daemon(killed, before.image) as after:
        node = await after.node()
        assert after.heard.recovered == []
        return [bitmap.name for bitmap in node.bitmaps.list()]


async def test_a_kill_before_it_is_added_leaves_none(path: Path, image: Path) -> None:
    async with daemon(path, image) as before:
        node = await before.node()
        await before.add(node, "old")
        coming = Coming("b", GRANULE)
        assert await before.state.expect(node, coming)
        await node.write(0, DATA)
        assert await names(before.after_kill(), before) == ["old"]
        # It stays expected over checkpoints.
        await before.checkpoint(node)
        bitmap = node.bitmaps.add("b", GRANULE)
        bitmap.persistent = True
        await before.checkpoint(node)
        assert await names(before.after_kill(), before) == ["b", "old"]
        coming.over = True
        assert await before.state.keep(node)
        await node.write(GRANULE, DATA)
        assert await names(before.after_kill(), before) == ["b", "old"]


async def test_what_was_expected_in_vain_is_forgotten(path: Path, image: Path) -> None:
    room = Room()
    async with daemon(path, image, before_commit=room.check) as before:
        node = await before.node()
        coming = Coming("b", GRANULE)
        assert await before.state.expect(node, coming)
        coming.over = True
        assert await before.state.keep(node)
        old = await before.add(node, "old")
        old.disable()
        room.none = True
        old.enable()
        assert not await before.state.keep(node)
        killed = before.after_kill()
        room.none = False
    async with daemon(killed, image) as after:
        await after.node()
        assert after.heard.recovered == [("old", "state-damaged")]


async def test_nothing_is_expected_where_that_can_not_be_stored(path: Path, image: Path) -> None:
    room = Room()
    async with daemon(path, image, before_commit=room.check) as before:
        node = await before.node()
        await before.add(node, "old")
        room.none = True
        assert not await before.state.expect(node, Coming("b", GRANULE))
        room.none = False
        # Nobody is worse off for having asked.
        assert before.heard.failed == []
        assert await names(before.after_kill(), before) == ["old"]
