"""A state directory under nodes over real files: what comes back, after what end."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.backup.incomplete import BitmapNeed
from blockd.bitmap import Bits, Inconsistent, Recording
from blockd.block import Node
from blockd.errors import BlockdError
from blockd.state import StateDirectory, changes
from blockd.state.commits import Pending
from blockd.state.host import Boot
from blockd.state.loading import unused_pieces
from tests.helpers.state_rig import (
    DATA,
    GRANULE,
    REGION,
    SIZE,
    Daemon,
    Heard,
    Room,
    daemon,
    dirty,
    make_image,
    open_node,
)

ALL = set(range(SIZE // GRANULE))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


async def test_a_clean_close_gives_the_bitmaps_back_as_they_were(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node, "on")
        await first.add(node, "off", 2 * GRANULE)
        await node.write(3 * GRANULE, DATA)
        node.bitmaps.get("off").disable()
        assert await first.state.keep(node)
        await node.write(9 * GRANULE, DATA)
        await first.close(node)
    async with daemon(path, image, boot=Boot("another", 0)) as second:
        node = await second.node()
        assert dirty(node, "on") == {3, 9}
        assert dirty(node, "off") == {1}
        assert [bitmap.name for bitmap in node.bitmaps.list()] == ["off", "on"]
        assert [bitmap.recording for bitmap in node.bitmaps.list()] == [False, True]
        assert second.heard.recovered == []
        await second.close(node)


async def test_a_bitmap_of_more_pieces_than_are_read_at_once(path: Path, tmp_path: Path) -> None:
    count = limits.STATE_READ_PIECES + 3
    window_bytes = limits.BITMAP_PIECE_GRANULES * 512
    image = make_image(tmp_path / "large.img", count * window_bytes)
    dirty_granules = {n * limits.BITMAP_PIECE_GRANULES + n for n in range(count)}
    async with daemon(path, image) as first:
        node = await first.node()
        bitmap = await first.add(node, "b", 512)
        bits = bitmap.copy_bits()
        bits.update_granules(dirty_granules)
        bitmap.put_back(bits)
        assert await first.state.keep(node)
        await first.close(node)
    async with daemon(path, image) as second:
        node = await second.node()
        assert dirty(node) == dirty_granules
        assert second.heard.recovered == []
        await second.close(node)


async def test_a_piece_of_another_type_is_damage(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(0, DATA)
        await first.close(node)
    with closing(sqlite3.connect(path / "state.db", isolation_level=None)) as database:
        database.execute("UPDATE piece SET data = 1")
    async with daemon(path, image) as second:
        assert dirty(await second.node()) == ALL
        assert second.heard.recovered == [("b", "state-damaged")]


async def test_after_a_kill_the_bits_are_exact(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        bitmap = await first.add(node)
        await node.write(0, DATA)
        freeze = bitmap.freeze("job")
        await node.write(5 * GRANULE, DATA)
        freeze.abdicate()
        await first.state.keep(node)
        await node.write(7 * GRANULE, DATA)
        node.write_nowait(8 * GRANULE, DATA)
        killed = first.after_kill()
        async with daemon(killed, image) as second:
            node = await second.node()
            assert dirty(node) == {5, 7, 8}
            assert second.heard.recovered == []
            # Once more, without a checkpoint in between.
            await node.write(11 * GRANULE, DATA)
            async with daemon(second.after_kill(), image) as third:
                assert dirty(await third.node()) == {5, 7, 8, 11}


async def test_after_a_power_cut_no_more_is_dirty_than_was_armed(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(0, DATA)
        await first.checkpoint(node)
        await first.checkpoint(node)
        await node.write(2 * REGION, DATA)
        booted_ns = image.stat().st_ctime_ns
        async with daemon(first.after_kill(), image, boot=Boot("next", booted_ns)) as second:
            per_region = REGION // GRANULE
            assert dirty(await second.node()) == {0, *range(2 * per_region, 3 * per_region)}


async def test_an_image_that_was_changed_while_closed(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await first.close(node)
        image.write_bytes(b"changed".ljust(SIZE, b"\0"))
        node = await first.node()
        assert first.heard.recovered == [("b", "image-changed")]
        assert dirty(node) == ALL
        await first.close(node)
        # It stays all dirty, for the same reason, until something is done about it.
        node = await first.node()
        assert dirty(node) == ALL
        assert first.heard.recovered == [("b", "image-changed")] * 2
        node.bitmaps.get("b").clear()
        await first.close(node)
        node = await first.node()
        assert dirty(node) == set()
        assert len(first.heard.recovered) == 2


async def close_badly(first: Daemon, node: Node) -> None:
    async with first.state.closing(node):
        await node.driver.close()
        raise OSError("the flush failed")


async def test_an_image_that_was_not_closed_well_is_kept_again(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        with pytest.raises(OSError, match="flush"):
            await close_badly(first, node)
        node = await first.node()
        assert dirty(node) == ALL
        node.bitmaps.get("b").clear()
        assert await first.state.keep(node)
        await node.write(GRANULE, DATA)
        async with daemon(first.after_kill(), image) as second:
            assert dirty(await second.node()) == {1}


async def test_a_write_after_the_last_checkpoint_is_not_forgotten(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(0, DATA)
        async with first.state.closing(node):
            await node.write(GRANULE, DATA)
            await node.driver.close()
        assert dirty(await first.node()) == ALL


async def test_an_image_that_was_renamed_is_found(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(0, DATA)
        await first.close(node)
        moved = image.with_name("moved.img")
        image.rename(moved)
        node = await first.node(moved)
        assert dirty(node) == {0}
        assert first.heard.recovered == []
        await node.write(GRANULE, DATA)
        await first.close(node)
        node = await first.node(moved)
        assert dirty(node) == {0, 1}


async def test_another_file_with_the_number_of_one_that_is_gone_is_another(
    path: Path, image: Path
) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await first.close(node)
        other = image.with_name("other.img")
        image.rename(other)
        make_image(other)
        node = await first.node(other)
        assert node.bitmaps.list() == ()
        assert first.heard.recovered == []


async def test_one_node_of_an_image_has_its_bitmaps(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        node = await first.node(name="one")
        await first.add(node)
        other = await first.node(name="two")
        assert other.bitmaps.list() == ()
        with pytest.raises(BlockdError, match=r"^Node 'one' keeps the bitmaps of"):
            first.state.check_persistent(other)


async def test_pieces_that_a_kill_left_without_a_bitmap_are_deleted(
    path: Path, image: Path
) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(0, DATA)
        await first.checkpoint(node)
        await first.state.commits.commit(Pending(changes.put_pieces([(77, b"x"), (78, b"y")])))
        killed = first.after_kill()
    async with daemon(killed, image) as second:
        await wait_all_tasks_blocked()
        while unused := await second.state.commits.read(lambda found: unused_pieces(found, 99)):
            assert set(unused) <= {77, 78}
        assert dirty(await second.node()) == {0}


async def test_a_second_daemon_is_refused_by_name(path: Path, nursery: trio.Nursery) -> None:
    first = await StateDirectory.open(str(path), nursery, Heard())
    with pytest.raises(BlockdError, match=f"in use by another blockd .process {os.getpid()}.$"):
        await StateDirectory.open(str(path), nursery, Heard())
    await first.close()
    second = await StateDirectory.open(str(path), nursery, Heard())
    await second.close()


def open_files() -> dict[str, str]:
    """This process's descriptors, and what each is of."""
    here = Path("/proc/self/fd")
    return {fd.name: os.readlink(fd) for fd in here.iterdir() if fd.exists()}


@pytest.mark.parametrize("version", [1, 99])
async def test_a_directory_of_another_version_is_refused_and_let_go_of(
    path: Path, nursery: trio.Nursery, version: int
) -> None:
    first = await StateDirectory.open(str(path), nursery, Heard())
    await first.close()
    with closing(sqlite3.connect(path / "state.db")) as database:
        database.execute(f"PRAGMA user_version = {version}")
    before = open_files()
    with pytest.raises(BlockdError, match="was made by another version of blockd"):
        await StateDirectory.open(str(path), nursery, Heard())
    assert open_files() == before


async def test_an_image_whose_real_name_is_not_utf_8(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "link.img"
    image.symlink_to(make_image(tmp_path / os.fsdecode(b"\xff.img")))
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(GRANULE, DATA)
        await first.close(node)
    async with daemon(path, image) as second:
        assert dirty(await second.node()) == {1}


async def test_what_completes_a_target_is_the_same_after_a_kill(path: Path, image: Path) -> None:
    """Of a bitmap that came from the image, too."""
    async with daemon(path, image) as first:
        node = await first.node()
        bits = Bits(SIZE, GRANULE)
        bitmap = node.bitmaps.add_kept("b", Recording(bits), read_only=False)
        assert await first.state.keep(node)
        need = BitmapNeed.of(node.name, bitmap)
        path = first.after_kill()
    async with daemon(path, image) as second:
        node = await second.node()
        assert BitmapNeed.of(node.name, node.bitmaps.get("b")) == need


async def test_what_an_image_is_left_with_goes_where_it_can_not_be_written_to(
    path: Path, image: Path
) -> None:
    """Such as a qcow2 image, which a kill leaves with bitmaps that are in use."""
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(GRANULE, DATA)
        path = first.after_kill()
    async with daemon(path, image) as second:
        node = open_node(image)
        node.read_only = True
        node.bitmaps.add_kept("b", Inconsistent(Bits(SIZE, GRANULE)), read_only=True)
        await second.state.attach(node)
        assert dirty(node) == {1}
        assert not node.bitmaps.get("b").inconsistent


async def test_a_job_is_not_taken_for_one_of_the_daemon_before(path: Path, image: Path) -> None:
    """Where it could not be recorded at the start that those have been told of."""
    room = Room()
    async with daemon(path, image) as first:
        await first.state.record_job("job", {"node": "before"})
        path = first.after_kill()
    room.none = True
    async with daemon(path, image, before_commit=room.check) as second:
        room.none = False
        await second.state.record_job("job", {"node": "after"})
        await second.state._record_left()
        path = second.after_kill()
    async with daemon(path, image) as third:
        assert third.state.unfinished_jobs == [("job", {"node": "after"})]
