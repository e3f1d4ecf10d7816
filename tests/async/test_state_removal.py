"""A bitmap that is removed while that can't be stored: it does not come back for good."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from weakref import ref

import pytest
from trio.testing import MockClock

from blockd import limits
from blockd.block import Node
from tests.helpers.state_rig import DATA, GRANULE, Daemon, daemon, dirty, make_image


class Disk:
    """Refuses commits while ``full``."""

    def __init__(self) -> None:
        self.full = False

    def before_commit(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def write(node: Node) -> None:
    await node.write(GRANULE, DATA)


async def leave(_: Node) -> None:
    """Nothing is written to the image while this daemon has it."""


async def close(one: Daemon, node: Node, _: MockClock) -> Path:
    await one.close(node)
    return one.after_kill()


async def store_and_kill(one: Daemon, node: Node, clock: MockClock) -> Path:
    clock.jump(limits.STATE_RETRY_SECONDS)
    assert one.state._attached[node].due, "it would not be tried again"
    await one.checkpoint(node)
    return one.after_kill()


@pytest.mark.parametrize("end", [close, store_and_kill])
@pytest.mark.parametrize("work", [write, leave])
async def test_it_is_removed_once_that_can_be_stored(
    tmp_path: Path,
    work: Callable[[Node], Awaitable[None]],
    end: Callable[[Daemon, Node, MockClock], Awaitable[Path]],
    mock_clock: MockClock,
) -> None:
    image, disk = make_image(tmp_path / "disk.img"), Disk()
    async with daemon(tmp_path / "state", image, before_commit=disk.before_commit) as one:
        node = await one.node()
        await one.add(node, "goes")
        await one.add(node, "stays")
        await one.close(node)
        node = await one.node()
        await work(node)
        expected = dirty(node, "stays")
        disk.full = True
        node.bitmaps.remove("goes")
        assert not await one.state.keep(node)
        disk.full = False
        async with daemon(await end(one, node, mock_clock), image) as two:
            found = await two.node()
            assert [bitmap.name for bitmap in found.bitmaps.list()] == ["stays"]
            assert dirty(found, "stays") == expected
            assert two.heard.recovered == []
        # What is stored had more than it must: nobody was in danger.
        assert one.heard.failed == []


async def test_the_others_are_exact_where_it_could_not_be_stored_at_all(tmp_path: Path) -> None:
    image, disk = make_image(tmp_path / "disk.img"), Disk()
    async with daemon(tmp_path / "state", image, before_commit=disk.before_commit) as one:
        node = await one.node()
        await one.add(node, "goes")
        await one.add(node, "stays")
        await node.write(GRANULE, DATA)
        await one.close(node)
        node = await one.node()
        disk.full = True
        node.bitmaps.remove("goes")
        assert not await one.state.keep(node)
        await one.close(node)
        async with daemon(one.after_kill(), image) as two:
            found = await two.node()
            assert {bitmap.name for bitmap in found.bitmaps.list()} == {"goes", "stays"}
            assert dirty(found, "stays") == dirty(found, "goes") == {1}
            assert two.heard.recovered == []


async def test_an_image_that_is_forgotten_leaves_no_marks_behind(tmp_path: Path) -> None:
    """They would take up room for ever, and be taken for those of an image to come."""
    path, image = tmp_path / "state", make_image(tmp_path / "disk.img")
    async with daemon(path, image) as one:
        node = await one.node()
        await one.add(node)
        node.bitmaps.remove("b")
        assert await one.state.keep(node)
        await node.write(GRANULE, DATA)
        await one.close(node)
        assert os.listdir(path / "marks") == ["heartbeat"]


async def test_marks_that_a_kill_left_behind_go_at_the_next_start(tmp_path: Path) -> None:
    path, image = tmp_path / "state", make_image(tmp_path / "disk.img")
    async with daemon(path, image) as one:
        node = await one.node()
        await one.add(node)
        node.bitmaps.remove("b")
        assert await one.state.keep(node)
        await node.write(GRANULE, DATA)
        marks = shutil.copytree(path / "marks", tmp_path / "marks")
        await one.close(node)
    # The image was forgotten, but its marks not deleted yet.
    shutil.copytree(marks, path / "marks", dirs_exist_ok=True)
    async with daemon(path, image) as two:
        assert os.listdir(path / "marks") == ["heartbeat"]
        await two.add(await two.node())
        killed = two.after_kill()
    async with daemon(killed, image) as three:
        assert dirty(await three.node()) == set()
        assert three.heard.recovered == []


async def test_one_that_is_gone_takes_no_memory(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", make_image(tmp_path / "disk.img")) as one:
        node = await one.node()
        await one.add(node, "stays")
        gone = ref(await one.add(node, "goes"))
        node.bitmaps.remove("goes")
        assert await one.state.keep(node)
        gc.collect()
        assert gone() is None


async def test_one_that_was_of_no_use_any_more_takes_no_room(tmp_path: Path) -> None:
    """What is stored of a bitmap is given up with it where the image was changed by others."""
    path, image = tmp_path / "state", make_image(tmp_path / "disk.img")
    async with daemon(path, image) as one:
        node = await one.node()
        await one.add(node)
        await node.write(GRANULE, DATA)
        await one.close(node)
    for number in range(3):
        os.utime(image, (number, number))
        async with daemon(path, image) as two:
            node = await two.node()
            assert [reason for _, reason in two.heard.recovered] == ["image-changed"]
            await node.write(GRANULE, DATA)
            await two.close(node)
    async with daemon(path, image) as three:
        records = await three.state.commits.read(lambda database: database.bitmaps())
    assert len(records) == 1
