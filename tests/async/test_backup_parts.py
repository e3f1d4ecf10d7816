"""Threads that copy to a target which has its bytes, or room for them, in several places."""

from __future__ import annotations

import errno

import pytest

from blockd.backup import Sync
from blockd.block import WriteBy
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, open_rig
from tests.helpers.stepped_driver import SteppedDriver

pytestmark = pytest.mark.usefixtures("small_backup_limits")


@pytest.fixture
def source() -> SteppedDriver:
    return SteppedDriver(OLD)


class Fragments(SteppedDriver):
    """Takes ``part_bytes`` in one place, and fails once it has taken ``room`` parts."""

    part_bytes = 3 * CLUSTER
    room = SIZE

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        end = offset + length
        while offset < end:
            if not self.room:
                raise OSError(errno.ENOSPC, "no room")
            self.room -= 1
            stop = min(offset + self.part_bytes, end)
            offset = await super().write_by(offset, stop - offset, call)
            if offset < stop:
                break
        return offset


async def test_threads_write_part_after_part(source: SteppedDriver) -> None:
    target = Fragments(SIZE)
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
    assert target.durable == OLD
    # Of 8, 8 and 5 clusters, in parts of 3.
    assert target.threads == 3 + 3 + 2
    assert source.read_once()


@pytest.mark.parametrize("parts", [0, 1, 4])
async def test_what_threads_find_no_room_for_is_written_the_other_way(
    parts: int, source: SteppedDriver
) -> None:
    target = Fragments(SIZE)
    target.room = parts
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
    assert target.durable == OLD
    assert target.threads == parts


async def test_parts_of_clusters_are_written_the_other_way(source: SteppedDriver) -> None:
    target = Fragments(SIZE)
    target.part_bytes = CLUSTER // 2
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
    assert target.durable == OLD
    assert target.threads > 0
    assert source.read_once()
