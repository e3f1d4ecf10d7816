"""A state directory that takes too long, or fails for a while: nothing is silently clean."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap
from tests.helpers.state_rig import DATA, GRANULE, SIZE, Room, daemon, dirty, make_image

ALL = set(range(SIZE // GRANULE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.raw")


def dirty_bits(bitmap: DirtyBitmap) -> Bits:
    bits = Bits(SIZE, bitmap.granularity_bytes)
    bits.mark(3 * GRANULE, 1)
    return bits


async def test_what_was_not_stored_in_time_is_known_not_to_be(
    path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    go_on.set()

    def before_commit() -> None:
        go_on.wait()

    async with daemon(path, image, before_commit=before_commit) as first:
        node = await first.node()
        bitmap = await first.add(node)
        await first.checkpoint(node)
        go_on.clear()
        bitmap.merge_from([dirty_bits(bitmap)])
        monkeypatch.setattr(limits, "STATE_KEEP_SECONDS", 0)
        kept = await first.state.keep(node)
        killed = first.after_kill()
        go_on.set()
        assert not kept
        assert len(first.heard.failed) == 1
        monkeypatch.undo()
        await first.checkpoint(node)
        assert first.heard.resumed == 1
        safe = first.after_kill()
    async with daemon(killed, image) as second:
        assert dirty(await second.node()) == ALL
        assert second.heard.recovered == [("b", "state-damaged")]
    async with daemon(safe, image) as third:
        assert dirty(await third.node()) == {3}


async def test_it_is_safe_again_when_all_of_it_is_stored(path: Path, image: Path) -> None:
    """Not when the bitmaps are that a command changed."""
    room = Room()
    async with daemon(path, image, before_commit=room.check) as first:
        node = await first.node()
        bitmap = await first.add(node)
        await node.write(GRANULE, DATA)
        await first.add(node, "other")
        room.none = True
        bitmap.disable()
        assert not await first.state.keep(node)
        room.none = False
        bitmap.enable()
        assert await first.state.keep(node)
        if first.heard.resumed:
            async with daemon(first.after_kill(), image) as second:
                assert dirty(await second.node()) == {1}
                assert second.heard.recovered == []
        await first.checkpoint(node)
        assert first.heard.resumed == 1
        async with daemon(first.after_kill(), image) as second:
            assert dirty(await second.node()) == {1}


async def test_what_could_not_be_enabled_durably_records_after_a_kill(
    path: Path, image: Path
) -> None:
    room = Room()
    async with daemon(path, image, before_commit=room.check) as first:
        node = await first.node()
        bitmap = await first.add(node)
        bitmap.disable()
        assert await first.state.keep(node)
        room.none = True
        bitmap.enable()
        assert not await first.state.keep(node)
        async with daemon(first.after_kill(), image) as second:
            node = await second.node()
            assert dirty(node) == ALL
            assert node.bitmaps.get("b").recording
