"""x-blockd-audit: what a bitmap calls clean is compared with the backup, while guests write."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.errors import BlockdError
from tests.helpers.command_rig import CommandRig
from tests.helpers.fake_archive import FakeArchive
from tests.helpers.memory_driver import MemoryDriver

KIB = 1024
PIECE = 8 * KIB
SIZE = 16 * PIECE + 3 * KIB
GRANULE = 2 * KIB
CONTENT = bytes(range(251)) * (SIZE // 251 + 1)


class Rig(CommandRig):
    """A disk whose bitmap says that nothing has changed since the backup on ``target``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.disk, self.target = MemoryDriver(CONTENT[:SIZE]), MemoryDriver(CONTENT[:SIZE])
        super().__init__(nursery, {"disk": self.disk, "target": self.target})
        self.archive = FakeArchive()
        self.graph.archive = self.archive
        self.bitmap = self.nodes["disk"].bitmaps.add("b", GRANULE)

    async def audit(self, **options: Any) -> str | None:
        """The job's error."""
        wanted = {"job_id": "j", "node": "disk", "bitmap": "b", "target": "target", **options}
        await self.execute("x-blockd-audit", **wanted)
        await self.jobs.get("j").wait_concluded()
        (info,) = await self.execute("query-jobs")
        await self.execute("job-dismiss", id="j")
        error: str | None = info.get("error")
        return error


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(limits, "BITMAP_AUDIT_PIECE_BYTES", PIECE)
    async with trio.open_nursery() as nursery:
        yield Rig(nursery)


async def test_all_is_well(rig: Rig) -> None:
    await rig.write("disk", 5 * PIECE + 100, 10)
    assert await rig.audit() is None
    assert rig.bitmap.count_bytes == GRANULE
    assert not rig.bitmap.busy
    read = {at for each in rig.target.reads for at in range(each.offset, each.end)}
    dirty = range(5 * PIECE, 5 * PIECE + GRANULE)
    assert read == set(range(SIZE)) - set(dirty)


@pytest.mark.parametrize("at", [0, 5 * PIECE, SIZE - 1])
async def test_one_byte_makes_everything_dirty(rig: Rig, at: int) -> None:
    rig.disk.data[at] ^= 1
    error = await rig.audit()
    assert error is not None
    assert "differs from its backup" in error
    assert rig.bitmap.count_bytes >= SIZE
    (event,) = [event for event in rig.events if event.name == "BLOCK_DIRTY_BITMAP_RECOVERED"]
    assert event.data == {
        "node-name": "disk",
        "name": "b",
        "reason": "image-changed",
        "inconsistent": False,
    }
    assert rig.nodes["disk"].bitmaps.infos()[0].reason is not None
    assert rig.archive.log == ["keep disk"]
    await rig.execute("block-dirty-bitmap-clear", node="disk", name="b")
    assert rig.nodes["disk"].bitmaps.infos()[0].reason is None


async def test_nobody_hears_of_it_before_a_kill_would_leave_it_so(rig: Rig) -> None:
    rig.disk.data[5 * PIECE] ^= 1
    rig.archive.ready = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.audit)
        await wait_all_tasks_blocked()
        assert rig.bitmap.count_bytes >= SIZE
        assert "BLOCK_DIRTY_BITMAP_RECOVERED" not in [event.name for event in rig.events]
        rig.archive.ready.set()
    assert "BLOCK_DIRTY_BITMAP_RECOVERED" in [event.name for event in rig.events]


async def test_what_guests_write_meanwhile_is_no_difference(rig: Rig) -> None:
    async with trio.open_nursery() as nursery:
        with rig.target.hold("read") as hold:
            nursery.start_soon(rig.audit)
            await hold.reached.wait()
            await rig.write("disk", 100, 10)
            await rig.write("disk", 3 * PIECE, PIECE)
            hold.release()
    assert not [event for event in rig.events if event.name == "BLOCK_DIRTY_BITMAP_RECOVERED"]
    assert rig.bitmap.count_bytes == PIECE + GRANULE


async def test_a_sample_is_a_part(rig: Rig) -> None:
    assert await rig.audit(sample=3 * PIECE) is None
    assert sum(each.length for each in rig.target.reads) in {3 * PIECE, 2 * PIECE + 3 * KIB}
    rig.target.reads.clear()
    assert await rig.audit(sample=100 * SIZE) is None
    assert sum(each.length for each in rig.target.reads) == SIZE


async def test_a_bad_sector_leaves_the_bitmap_as_it_is(rig: Rig) -> None:
    rig.target.fail("read", errno.EIO, nth=3)
    assert await rig.audit() == "Input/output error"
    assert rig.bitmap.count_bytes == 0
    assert not rig.bitmap.busy


async def test_a_cancelled_one_says_nothing(rig: Rig) -> None:
    rig.disk.data[SIZE - 1] ^= 1
    with rig.target.hold("read"):
        wanted = {"job_id": "j", "node": "disk", "bitmap": "b", "target": "target"}
        await rig.execute("x-blockd-audit", **wanted)
        with pytest.raises(BlockdError, match="in use by another operation"):
            await rig.execute("block-dirty-bitmap-clear", node="disk", name="b")
        await rig.execute("job-cancel", id="j")
    assert rig.bitmap.count_bytes == 0
    assert not rig.bitmap.busy
    assert not rig.nodes["target"].users


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node": "no"}, "Cannot find"),
        ({"target": "no"}, "Cannot find"),
        ({"bitmap": "no"}, "not found"),
        ({"bitmap": "off"}, "disabled"),
        ({"target": "small"}, "different sizes"),
        ({"target": "disk"}, "cannot be the same"),
        ({"job_id": "!"}, "Invalid job ID"),
        ({"speed": -1}, "speed"),
        ({"sample": 0}, "'sample' of 0 bytes compares nothing.*leave it out"),
        ({"sample": -1}, "sample"),
        ({"sample": 1 << 64}, "sample"),
        ({"sample": 0.5}, "sample"),
        ({"sample": float("nan")}, "sample"),
        ({"sample": True}, "sample"),
    ],
)
async def test_what_is_refused(rig: Rig, options: dict[str, Any], message: str) -> None:
    rig.nodes["disk"].bitmaps.add("off", GRANULE, disabled=True)
    rig.graph.add("small", MemoryDriver(512), owned=True)
    with pytest.raises(BlockdError, match=message):
        await rig.audit(**options)
    assert not rig.bitmap.busy
    assert not rig.nodes["disk"].users
    assert not rig.nodes["target"].users
