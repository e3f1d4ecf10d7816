"""A node's size: who follows when it changes, and who is in the way."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Graph, Node, RawDriver, Role
from blockd.errors import BlockdError
from tests.helpers.watched_driver import WatchedDriver

SIZE = 64 * 1024
GRANULARITY = 512


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
def driver() -> WatchedDriver:
    driver = WatchedDriver(SIZE)
    driver.filename = "/file.img"
    return driver


@pytest.fixture
def file(graph: Graph, driver: WatchedDriver) -> Node:
    return graph.add("file", driver, owned=True)


def add_raw(
    graph: Graph, name: str, child: Node, *, offset_bytes: int = 0, size_bytes: int | None = None
) -> Node:
    driver = RawDriver(child, offset_bytes=offset_bytes, size_bytes=size_bytes)
    return graph.add(name, driver, owned=True)


async def refusal(graph: Graph, node: Node, size: int) -> str:
    before = [each.size_bytes for each in graph]
    with pytest.raises(BlockdError) as raised:
        await graph.resize(node, size)
    assert [each.size_bytes for each in graph] == before
    return raised.value.message


async def test_all_that_stand_on_it_follow(graph: Graph, file: Node) -> None:
    left = add_raw(graph, "left", file)
    top = add_raw(graph, "top", left)
    right = add_raw(graph, "right", file)
    for resized in (file, left, top):
        for size in (1024, 0, 2 * SIZE):
            await graph.resize(resized, size)
            assert [node.size_bytes for node in (file, left, top, right)] == [size] * 4
            assert top.driver.size_bytes == size
    assert top.driver.identity == file.driver.identity
    assert not file.users.of(Role.ROOT)


async def test_a_window_leaves_its_offset(graph: Graph, file: Node) -> None:
    window = add_raw(graph, "window", file, offset_bytes=4096)
    await graph.resize(window, 512)
    assert (window.size_bytes, file.size_bytes) == (512, 4096 + 512)
    assert "unshared by node 'window'" in await refusal(graph, file, SIZE)
    fixed = add_raw(graph, "fixed", window, size_bytes=512)
    assert await refusal(graph, fixed, 1024) == "Cannot resize fixed-size raw disks"


async def test_bitmaps_follow_on_every_level(graph: Graph, file: Node) -> None:
    top = add_raw(graph, "top", file)
    bitmaps = [node.bitmaps.add("b", GRANULARITY) for node in (file, top)]
    await top.write(SIZE - 1024, memoryview(b"x" * 1024))
    await graph.resize(file, SIZE - 512)
    assert [bitmap.count_bytes for bitmap in bitmaps] == [512, 512]
    await graph.resize(file, 2 * SIZE)
    assert [bitmap.count_bytes for bitmap in bitmaps] == [1024, 1024]
    assert all(bitmap.copy_bits().size_bytes == 2 * SIZE for bitmap in bitmaps)


async def test_it_waits_for_writes_and_they_for_it(
    graph: Graph, file: Node, driver: WatchedDriver
) -> None:
    with driver.hold("write") as write, driver.hold("truncate") as truncate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.write, 0, memoryview(b"x" * 512))
            await write.reached.wait()
            nursery.start_soon(graph.resize, file, 1024)
            await wait_all_tasks_blocked()
            assert driver.counts["truncate"] == 0
            write.release()
            await truncate.reached.wait()
            nursery.start_soon(file.write, 512, memoryview(b"y" * 512))
            await wait_all_tasks_blocked()
            assert driver.counts["write"] == 1
            truncate.release()
    assert driver.data == b"x" * 512 + b"y" * 512


async def test_one_that_fails_leaves_the_node_usable(
    graph: Graph, file: Node, driver: WatchedDriver
) -> None:
    driver.fail("truncate", errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        await graph.resize(file, 2 * SIZE)
    assert file.size_bytes == SIZE
    await file.write(0, memoryview(b"x"))
    await graph.resize(file, 2 * SIZE)
    assert file.size_bytes == 2 * SIZE


@pytest.mark.parametrize("role", [Role.ROOT, Role.SOURCE])
async def test_who_relies_on_the_size_is_named(graph: Graph, file: Node, role: Role) -> None:
    """Also for the nodes below the one that is used, and for those above it."""
    middle = add_raw(graph, "middle", file)
    top = add_raw(graph, "top", middle)
    hold = graph.hold(middle, "somebody", role, writes=False)
    assert await refusal(graph, middle, 512) == (
        "Permission conflict on node 'middle': permissions 'resize' are both required by an "
        "unnamed block device (uses node 'middle' as 'root' child) and unshared by somebody "
        f"(uses node 'middle' as '{role.value}' child)."
    )
    assert "unshared by node 'middle' (uses node 'file'" in await refusal(graph, file, 512)
    assert "unshared by somebody (uses node 'middle'" in await refusal(graph, top, 512)
    hold.release()
    await graph.resize(top, 512)


async def test_a_target_is_busy(graph: Graph, file: Node) -> None:
    with_job = graph.hold(file, "block job 'j'", Role.TARGET, writes=True)
    message = "Node 'file' is busy: block device is in use by block job: backup"
    assert await refusal(graph, file, 512) == message
    with_job.release()
