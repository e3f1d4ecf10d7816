"""Bitmaps in an image: those of QEMU loaded here, ours loaded by QEMU, and back again."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from blockd import limits
from blockd.bitmap import Inconsistent, NodeBitmaps
from blockd.block.qcow2.bitmap_directory import BitmapFlag
from blockd.block.qcow2.bitmaps import Qcow2Bitmaps
from blockd.errors import BlockdError
from tests.helpers.peer import Peer
from tests.helpers.qcow2 import check, options, qemu_img, qemu_io
from tests.helpers.qcow2_room import CrashError, FileRoom
from tests.helpers.qmp_client import QmpClient

KIB = 1 << 10
MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, str(SIZE))
    return path


def flags(image: Path) -> dict[str, list[str]]:
    """What qemu-img tells of each bitmap in the image."""
    info = json.loads(qemu_img("info", "--output=json", image))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: each["flags"] for each in bitmaps}


@contextmanager
def opened_by_qemu(image: Path) -> Iterator[QmpClient]:
    """qemu-storage-daemon with the image as node ``n``; nothing is written to it."""
    program = Peer(image.parent)
    with QmpClient(program.start()) as client:
        file = {"driver": "file", "filename": str(image)}
        client.execute(
            "blockdev-add",
            {"driver": "qcow2", "node-name": "n", "read-only": True, "file": file},
        )
        yield client
        client.execute("quit")
    program.wait()


def digests_by_qemu(image: Path) -> dict[str, str]:
    names = list(flags(image))
    with opened_by_qemu(image) as client:
        return {name: digest(client, name) for name in names}


def digest(client: QmpClient, name: str) -> str:
    answer = client.execute("x-debug-block-dirty-bitmap-sha256", {"node": "n", "name": name})
    return str(answer["sha256"])


class Opened:
    """An image that is open here, and its bitmaps."""

    def __init__(self, image: Path, *, read_only: bool = False, writes: int = -1) -> None:
        self.room = FileRoom(image, read_only=read_only, writes_left=writes)
        self.bitmaps = NodeBitmaps(self.room.size_bytes)
        self.kept = Qcow2Bitmaps(self.room)

    async def load(self) -> None:
        for name, state in await self.kept.load():
            self.bitmaps.add_kept(name, state, read_only=self.room.read_only)
        if not self.room.read_only:
            await self.kept.mark_in_use()

    async def close(self) -> None:
        await self.kept.store(self.bitmaps.list())
        self.room.close()

    def add(self, name: str, granularity: int = 65536, *, disabled: bool = False) -> None:
        bitmap = self.bitmaps.add(name, granularity, disabled=disabled)
        bitmap.persistent = True

    def digests(self) -> dict[str, str]:
        return {each.name: each.copy_bits().digest() for each in self.bitmaps.list()}


async def opened(image: Path, *, read_only: bool = False) -> Opened:
    image_ = Opened(image, read_only=read_only)
    await image_.load()
    return image_


@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
@pytest.mark.parametrize("granularity", [512, 65536, 1 << 31])
async def test_bitmaps_of_qemu_are_loaded(tmp_path: Path, cluster: str, granularity: int) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", *options(f"cluster_size={cluster}"), image, "16M")
    qemu_img("bitmap", "--add", "-g", str(granularity), image, "on")
    qemu_io(image, "write 100k 1k", "write 1M 3M", "write 16776704 512")
    qemu_img("bitmap", "--add", "-g", str(granularity), "--disable", image, "off")
    expected = digests_by_qemu(image)
    here = await opened(image, read_only=True)
    assert here.digests() == expected
    assert {each.name: each.recording for each in here.bitmaps.list()} == {"on": True, "off": False}
    assert all(each.read_only and each.persistent for each in here.bitmaps.list())
    assert flags(image) == {"on": ["auto"], "off": []}


async def test_ours_are_loaded_by_qemu(image: Path) -> None:
    here = await opened(image)
    here.add("fine", 512)
    here.add("coarse", 1 << 20, disabled=True)
    here.add("all")
    here.bitmaps.get("all").copy_bits()
    here.bitmaps.recent += [(0, 1), (5 * MIB, 3 * MIB), (SIZE - 1, 1)]
    here.bitmaps.get("coarse").merge_from([here.bitmaps.get("fine").usable_bits()])
    here.bitmaps.recent.append((0, SIZE))
    await here.close()
    check(image)
    assert flags(image) == {"fine": ["auto"], "coarse": [], "all": ["auto"]}
    assert digests_by_qemu(image) == here.digests()


async def test_they_go_to_and_fro(image: Path) -> None:
    """QEMU writes, we write, QEMU writes: each takes over what the other has marked."""
    qemu_img("bitmap", "--add", "-g", "64k", image, "b")
    qemu_io(image, "write 0 64k")
    here = await opened(image)
    assert flags(image) == {"b": ["in-use", "auto"]}
    here.bitmaps.recent.append((MIB, 64 * KIB))
    await here.close()
    check(image)
    assert flags(image) == {"b": ["auto"]}
    qemu_io(image, "write 2M 64k")
    again = await opened(image)
    (info,) = again.bitmaps.infos()
    assert info.count_bytes == 3 * 64 * KIB
    dirty = [each.offset for each in again.bitmaps.get("b").copy_bits().extents()]
    assert dirty == [0, MIB, 2 * MIB]
    await again.close()
    check(image)


async def test_left_open_they_are_inconsistent_and_can_be_removed(image: Path) -> None:
    for name in ("a", "b"):
        qemu_img("bitmap", "--add", image, name)
    left = await opened(image)
    left.room.close()
    check(image)
    here = await opened(image)
    assert all(isinstance(each.state, Inconsistent) for each in here.bitmaps.list())
    await here.kept.remove("a")
    here.bitmaps.remove("a")
    here.add("c")
    await here.close()
    check(image)
    assert flags(image) == {"b": ["in-use", "auto"], "c": ["auto"]}
    qemu_img("bitmap", "--remove", image, "b")
    check(image)


async def test_the_last_one_removed_takes_the_extension_along(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b")
    here = await opened(image)
    await here.kept.remove("b")
    here.bitmaps.remove("b")
    await here.close()
    check(image)
    assert flags(image) == {}
    assert (await opened(image)).room.header.extensions.bitmaps is None


async def test_a_crash_at_any_write_leaves_a_sound_image(image: Path) -> None:
    """The old bitmaps, marked as in use, or the new ones; never half of both."""
    qemu_img("bitmap", "--add", image, "b")
    fresh = image.read_bytes()
    writes, done = 0, False
    seen = set()
    while not done:
        image.write_bytes(fresh)
        here = Opened(image, writes=writes)
        try:
            await here.load()
            here.add("c", 512)
            here.bitmaps.recent.append((MIB, 64 * KIB))
            await here.close()
            done = True
        except CrashError:
            here.room.close()
        # What was allocated and not linked is leaked, and no error.
        qemu_img("check", "-r", "leaks", image)
        check(image)
        seen.add(json.dumps(flags(image)))
        writes += 1
    assert seen == {
        json.dumps(each)
        for each in ({"b": ["auto"]}, {"b": ["in-use", "auto"]}, {"b": ["auto"], "c": ["auto"]})
    }


async def test_many_bitmaps_with_long_names(image: Path) -> None:
    here = await opened(image)
    names = [f"{number:05}" + "é" * 500 for number in range(300)]
    for name in names:
        here.add(name)
    here.bitmaps.recent.append((0, 1))
    await here.close()
    check(image)
    assert list(flags(image)) == names[::-1]
    again = await opened(image)
    assert [each.name for each in again.bitmaps.list()] == names
    assert all(info.count_bytes == 65536 for info in again.bitmaps.infos())


def test_no_more_are_taken_than_an_image_can_keep(image: Path) -> None:
    here = Opened(image)
    here.add("b")
    here.add("n" * limits.BITMAP_NAME_BYTES)
    short, long = here.bitmaps.kept()
    most = limits.QCOW2_BITMAPS
    here.kept.check_new("another", 65536, [short] * (most - 1))
    with pytest.raises(BlockdError, match="Maximum number of persistent bitmaps is already"):
        here.kept.check_new("another", 65536, [short] * most)
    with pytest.raises(BlockdError, match="Not enough space in the bitmap directory"):
        here.kept.check_new("another", 65536, [long] * (most - 1))


@pytest.mark.parametrize("flag", [BitmapFlag(0), BitmapFlag.EXTRA_DATA_COMPATIBLE])
async def test_extra_data_is_kept(image: Path, flag: BitmapFlag) -> None:
    """QEMU refuses it; the specification wants it to be left as it is, and to be respected."""
    qemu_img("bitmap", "--add", image, "b")
    here = await opened(image)
    await here.kept.store(here.bitmaps.list())
    (entry,) = here.kept.entries
    extra = replace(entry, extra_data=b"what is it", flags=entry.flags | flag)
    await here.kept._replace([extra])
    here.room._freed.clear()
    here.room.close()
    again = await opened(image)
    assert again.bitmaps.get("b").inconsistent == (not flag)
    again.add("c")
    await again.close()
    assert [each.extra_data for each in again.kept.entries] == [b"what is it", b""]
    # Nobody here records in one that is not understood, so nobody may believe it any more.
    assert again.kept.entries[0].flags == BitmapFlag.AUTO | (flag or BitmapFlag.IN_USE)
    assert (await opened(image)).kept.entries[0].extra_data == b"what is it"


def damage(image: Path, offset: int, form: str, value: int) -> None:
    """Change the bitmap directory, or what lies at ``offset`` from it."""
    room = FileRoom(image)
    extension = room.header.extensions.bitmaps
    assert extension is not None
    with image.open("r+b") as file:
        file.seek(extension.directory_offset + offset)
        file.write(struct.pack(form, value))


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, ">Q", 0),
        (0, ">Q", 512),
        (8, ">I", 0),
        (8, ">I", 2),
        (8, ">I", 0xFFFFFFFF),
        (12, ">I", 8),
        (16, ">B", 2),
        (17, ">B", 8),
        (17, ">B", 40),
        (18, ">H", 0xFFFF),
    ],
)
async def test_damage_costs_the_bitmaps_where_qemu_refuses_the_disk(
    image: Path, offset: int, form: str, value: int
) -> None:
    qemu_img("bitmap", "--add", image, "b")
    damage(image, offset, form, value)
    with pytest.raises(AssertionError) as theirs:
        qemu_io(image, "quit")
    as_it_was = image.read_bytes()
    only_read = await opened(image, read_only=True)
    assert only_read.bitmaps.list() == ()
    assert image.read_bytes() == as_it_was
    here = await opened(image)
    assert here.bitmaps.list() == ()
    (words,) = here.room.damage
    assert words in str(theirs.value)
    assert only_read.room.damage == [words]
    assert here.room.leaks
    assert not only_read.room.leaks
    # From before the first write on nobody believes them.
    assert flags(image) == {}
    here.add("c")
    await here.close()
    assert flags(image) == {"c": ["auto"]}
    qemu_img("check", "-r", "leaks", image)
    check(image)


@pytest.mark.parametrize("offset", [0, 65536, 3 * 65536, 1 << 40])
async def test_tables_that_overlap_or_lie_outside_are_lost(image: Path, offset: int) -> None:
    qemu_img("bitmap", "--add", image, "b")
    damage(image, 0, ">Q", offset)
    here = await opened(image)
    assert here.bitmaps.list() == ()
    (damage_,) = here.room.damage
    assert re.search(r"overlaps|beyond the end|constraints", damage_)
    assert flags(image) == {}
