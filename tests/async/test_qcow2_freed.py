"""What a qcow2 image frees goes back to its file in as few steps as it can."""

from __future__ import annotations

import random

from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.block.qcow2.metadata import join_runs
from tests.helpers.memory_driver import MemoryDriver

CLUSTER = 512
#: As many as one refcount block counts.
COUNT = 256


async def open_full(storage: MemoryDriver) -> Qcow2Driver:
    """An image in whose clusters there is data, and whose metadata is in the file."""
    file = Node("file", storage)
    await create_image(file, ImageOptions(COUNT * CLUSTER, cluster_size_bytes=CLUSTER))
    image = await open_image(file, await read_header(file), discard_freed=True)
    driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
    await driver.write(0, memoryview(bytes([1]) * COUNT * CLUSTER))
    await driver.flush()
    return driver


async def test_clusters_that_lie_together_are_discarded_together() -> None:
    """Each discard is a hop to a thread: one per cluster took a minute on a busy host."""
    storage = MemoryDriver(0)
    driver = await open_full(storage)
    before = storage.counts["discard"]
    order = list(range(COUNT))
    random.Random(1).shuffle(order)
    for cluster in order:
        await driver.discard(cluster * CLUSTER, CLUSTER)
    await driver.close()
    # Tables lie between them, and refcount blocks end.
    assert storage.counts["discard"] - before < COUNT // 16


async def test_what_no_block_fits_in_is_not_discarded() -> None:
    storage = MemoryDriver(0)
    driver = await open_full(storage)
    before = storage.counts["discard"]
    for cluster in range(0, COUNT, 2):
        await driver.discard(cluster * CLUSTER, CLUSTER)
    # At the first they may still be in use, by the flush itself.
    await driver.flush()
    await driver.flush()
    assert storage.counts["discard"] == before
    # All the same they are free.
    size = storage.size_bytes
    for cluster in range(0, COUNT, 2):
        await driver.write(cluster * CLUSTER, memoryview(bytes([2]) * CLUSTER))
    await driver.close()
    assert storage.size_bytes <= size


def test_runs_are_joined_where_one_begins_at_the_end_of_another() -> None:
    assert join_runs([(5, 1), (3, 2), (9, 1), (6, 2)]) == [(3, 5), (9, 1)]
    assert join_runs([]) == []


def test_each_reference_that_is_gone_stays_counted() -> None:
    runs = [(3, 2), (3, 2), (4, 1), (5, 1), (5, 1)]
    assert clusters(join_runs(runs)) == clusters(runs)


def clusters(runs: list[tuple[int, int]]) -> list[int]:
    return sorted(each for first, count in runs for each in range(first, first + count))
