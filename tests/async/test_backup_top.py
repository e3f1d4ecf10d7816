"""A backup of what the topmost image holds, and not of the images below it."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.backup import BitmapMode, Sync
from blockd.block import Node
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, Rig, open_rig
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

BASE = OLD
#: Bytes that the overlay holds from the beginning: a part of a cluster counts as all of it.
HELD = {2: 100, 3: CLUSTER, 9: 1, 15: CLUSTER, 20: 3}
NEW = b"N"

pytestmark = pytest.mark.usefixtures("small_backup_limits")


@pytest.fixture
async def source() -> MemoryOverlay:
    overlay = MemoryOverlay(SIZE, Node("base", MemoryDriver(BASE)))
    node = Node("top", overlay)
    for cluster, length in HELD.items():
        await node.write(cluster * CLUSTER, memoryview(NEW * length))
    return overlay


def content() -> bytes:
    """What a guest sees."""
    data = bytearray(BASE)
    for cluster, length in HELD.items():
        data[cluster * CLUSTER : cluster * CLUSTER + length] = NEW * length
    return bytes(data)


def only(*clusters: int) -> bytes:
    """These clusters as a guest sees them, and zeroes else."""
    seen = content()
    pieces = [seen[at * CLUSTER :][:CLUSTER] for at in range(21)]
    return b"".join(
        piece if at in clusters else bytes(len(piece)) for at, piece in enumerate(pieces)
    )


async def write(rig: Rig, cluster: int, length: int = 5) -> None:
    await rig.source.write(cluster * CLUSTER, memoryview(b"w" * length))


async def test_only_what_the_top_holds_is_copied(
    source: MemoryOverlay, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.TOP)
        await rig.start(job)
        assert await rig.finish(job) is None
        assert target.data == only(*HELD)
        assert (job.current_progress, job.total_progress) == (5 * CLUSTER, 5 * CLUSTER)


async def test_an_empty_top_is_copied_at_once(target: MemoryDriver) -> None:
    source = MemoryOverlay(SIZE, Node("base", MemoryDriver(BASE)))
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.TOP) is None
        assert target.counts["write"] == 0
        assert rig.named("BLOCK_JOB_COMPLETED")[0]["len"] == 0


async def test_without_a_backing_file_what_is_not_allocated_is_left_out(
    target: MemoryDriver,
) -> None:
    target.data[:] = b"x" * SIZE
    source = MemoryOverlay(SIZE, None)
    async with open_rig(source, target) as rig:
        await write(rig, 4)
        assert await rig.copy(Sync.TOP) is None
    assert target.data[4 * CLUSTER : 5 * CLUSTER].rstrip(b"\0") == b"wwwww"
    assert target.data[: 4 * CLUSTER] + target.data[5 * CLUSTER :] == b"x" * (SIZE - CLUSTER)


async def test_a_disk_that_is_one_layer_is_copied_whole(target: MemoryDriver) -> None:
    """Its holes too: it holds them."""
    source = MemoryDriver(BASE[: 4 * CLUSTER] + bytes(SIZE - 4 * CLUSTER))
    target.data[:] = b"x" * SIZE
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.TOP) is None
    assert target.data == source.data


async def test_what_guests_overwrite_meanwhile_is_as_it_was(
    source: MemoryOverlay, target: MemoryDriver
) -> None:
    """Also where only a lower layer held it: then it is on the target as well."""
    async with open_rig(source, target) as rig:
        with source.hold("allocation"):
            job = rig.job(Sync.TOP)
            await rig.start(job)
            async with trio.open_nursery() as nursery:
                for cluster in (0, 3, 20):
                    nursery.start_soon(write, rig, cluster)
                await wait_all_tasks_blocked()
        assert await rig.finish(job) is None
        assert target.data == only(0, *HELD)
        assert job.current_progress == job.total_progress == 6 * CLUSTER


async def test_where_the_source_does_not_say_it_is_copied(
    source: MemoryOverlay, target: MemoryDriver
) -> None:
    """The first stretch of 8 clusters; what it is asked later, to find zeroes, it answers."""
    source.fail("allocation", errno.EIO)
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.TOP) is None
    assert target.data == only(*range(8), *HELD)


async def test_a_bitmap_forgets_what_was_not_to_be_copied(
    source: MemoryOverlay, target: MemoryDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        await write(rig, 2)
        target.fail("write", errno.EIO, times=99)
        assert await rig.copy(Sync.TOP, "b", BitmapMode.ALWAYS) == "Input/output error"
        assert bitmap.usable_bits().count_bytes == 5 * CLUSTER
        assert not bitmap.usable_bits().intersects(0, 2 * CLUSTER)
        target.heal()
        assert await rig.copy(Sync.BITMAP, "b", BitmapMode.ON_SUCCESS) is None
        assert target.data[3 * CLUSTER :] == only(*HELD)[3 * CLUSTER :]
        assert not bitmap.usable_bits().any()
