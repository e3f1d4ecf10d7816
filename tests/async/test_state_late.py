"""What a command began, and a hung disk ends only after the node has been closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.helpers.hung_commits import HungCommits
from tests.helpers.state_rig import (
    DATA,
    GRANULE,
    SIZE,
    Daemon,
    daemon,
    dirty,
    make_image,
    open_node,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


async def add_and_close(one: Daemon) -> None:
    node = await one.node()
    await one.add(node)
    await node.write(3 * GRANULE, DATA)
    await one.close(node)


async def test_a_node_that_is_closed_is_kept_no_more(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = HungCommits()
    async with daemon(tmp_path / "state", image, before_commit=commits.before) as one:
        await add_and_close(one)
        # Its image has bitmaps that are not its own, and have to be forgotten first.
        node = open_node(image)
        node.bitmaps.add("late", GRANULE).persistent = True
        with commits.hung(monkeypatch):
            assert not await one.state.keep(node)
            await one.close(node)
        await one.at_rest()
        again = await one.node()
        assert again.bitmaps.list() == ()
        one.state.check_persistent(again)
        assert await one.add(again)


async def test_a_closed_image_is_recorded_as_closed(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = HungCommits()
    async with daemon(tmp_path / "state", image, before_commit=commits.before) as one:
        await add_and_close(one)
        node = await one.node()
        async with trio.open_nursery() as nursery:
            with commits.hung(monkeypatch):
                assert not await one.state.keep(node)
                nursery.start_soon(one.close, node)
                await wait_all_tasks_blocked()
        await one.at_rest()
        async with daemon(one.after_kill(), image) as two:
            assert dirty(await two.node()) == {3}
            assert two.heard.recovered == []
        image.write_bytes(b"changed".ljust(SIZE, b"\0"))
        async with daemon(one.after_kill(), image) as two:
            await two.node()
            assert two.heard.recovered == [("b", "image-changed")]
