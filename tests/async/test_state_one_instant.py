"""What a transaction does at one instant is stored at one, whatever was being stored meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from blockd.bitmap import DirtyBitmap
from blockd.block import Node
from tests.helpers.state_rig import DATA, GRANULE, Daemon, daemon, dirty, make_image

#: Of the commits of one checkpoint: the pieces, and what makes them count.
COMMITS = (2, 3)


@dataclass
class Story:
    """``later`` notes what guests write while what ``fetched`` has is fetched."""

    node: Node
    fetched: DirtyBitmap
    later: DirtyBitmap
    other: DirtyBitmap

    @classmethod
    async def begin(cls, one: Daemon) -> Story:
        node = await one.node()
        fetched, later, other = [await one.add(node, name) for name in ("f", "l", "o")]
        later.disable()
        await node.write(1 * GRANULE, DATA)
        fetched.disable()
        later.enable()
        await node.write(2 * GRANULE, DATA)
        assert await one.state.keep(node)
        return cls(node, fetched, later, other)

    def take_over(self) -> None:
        """At one instant: ``fetched`` becomes what ``later`` is."""
        self.fetched.clear()
        self.fetched.merge_from([self.later.usable_bits()])

    def take_over_and_remove(self) -> None:
        self.take_over()
        self.node.bitmaps.remove(self.later.name)

    def take_over_and_clear(self) -> None:
        self.take_over()
        self.later.clear()

    def mark_more(self) -> None:
        self.fetched.merge_from([self.other.usable_bits()])

    def mark_other(self) -> None:
        self.other.put_back(self.other.copy_bits())


Step = Callable[[Story], None]


@pytest.mark.parametrize("at_commit", COMMITS)
@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [
        (Story.mark_other, Story.take_over_and_remove),
        (Story.mark_other, Story.take_over_and_clear),
        (Story.take_over_and_remove, Story.mark_more),
        (Story.take_over_and_clear, Story.mark_more),
    ],
)
async def test_no_kill_finds_half_of_a_transaction(
    before: Step, meanwhile: Step, at_commit: int, tmp_path: Path
) -> None:
    """``before`` is being stored, and in one of the commits comes ``meanwhile``."""
    image, killed, number = make_image(tmp_path / "disk.img"), list[Path](), 0
    story: Story | None = None

    def before_commit() -> None:
        nonlocal number
        if story is None:
            return
        number += 1
        if number > at_commit:
            killed.append(one.after_kill())
        if number == at_commit:
            trio.from_thread.run_sync(meanwhile, story)

    async with daemon(tmp_path / "state", image, before_commit=before_commit) as one:
        begun = await Story.begin(one)
        before(begun)
        story = begun
        assert await one.state.keep(story.node)
        assert await one.state.keep(story.node)
    for state in killed:
        async with daemon(state, image) as two:
            node = await two.node()
            there = {bitmap.name: dirty(node, bitmap.name) for bitmap in node.bitmaps.list()}
            assert 2 in there["f"] | there.get("l", set()), (state.name, there)


async def test_what_another_node_takes_over_is_stored_there_first(tmp_path: Path) -> None:
    image, other_image = (make_image(tmp_path / name) for name in ("disk.img", "other.img"))
    killed: list[Path] = []
    noting = False

    def before_commit() -> None:
        if noting:
            killed.append(one.after_kill())

    async with daemon(tmp_path / "state", image, before_commit=before_commit) as one:
        node, other = await one.node(), await one.node(other_image, name="other")
        gives, takes = await one.add(node, "gives"), await one.add(other, "takes")
        await node.write(2 * GRANULE, DATA)
        takes.merge_from([gives.usable_bits()])
        gives.clear()
        noting = True
        assert await one.state.keep(node)
        killed.append(one.after_kill())
        noting = False
    for state in killed:
        async with daemon(state, image) as two:
            node, other = await two.node(), await two.node(other_image, name="other")
            assert 2 in dirty(node, "gives") | dirty(other, "takes"), state.name
