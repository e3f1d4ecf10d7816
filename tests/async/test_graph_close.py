"""The end of the daemon: every disk that can be flushed is, whatever the others do."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd.block import Graph, Node, RawDriver, Role
from tests.helpers.memory_driver import MemoryDriver

SIZE = 4096
DATA = memoryview(b"d" * 512)


class Disk:
    """A node with something written to it that is not durable yet."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.driver = MemoryDriver(SIZE)
        self.node: Node = graph.add(name, self.driver, owned=True)

    async def write(self) -> None:
        await self.node.write(0, DATA)
        assert not self.durable

    @property
    def durable(self) -> bool:
        return self.driver.durable == self.driver.data

    @property
    def flushes(self) -> int:
        return self.driver.counts["flush"]


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
async def disks(graph: Graph) -> list[Disk]:
    disks = [Disk(graph, name) for name in ("first", "second", "third")]
    for disk in disks:
        await disk.write()
    return disks


each_disk = pytest.mark.parametrize("number", range(3))


async def test_every_writable_node_is_flushed_and_closed(graph: Graph, disks: list[Disk]) -> None:
    read_only = MemoryDriver(SIZE, read_only=True)
    graph.add("read-only", read_only, owned=True)
    await graph.close()
    assert all(disk.durable and disk.driver.closed for disk in disks)
    assert read_only.counts["flush"] == 0
    assert read_only.closed
    assert list(graph) == []


async def test_what_lies_below_a_node_is_flushed(graph: Graph, disks: list[Disk]) -> None:
    below = disks[0].node
    disks[0].driver.filename = "memory"
    graph.add("top", RawDriver(below), owned=True)
    await graph.close()
    assert all(disk.durable and disk.driver.closed for disk in disks)


@each_disk
@pytest.mark.parametrize("role", [Role.SOURCE, Role.TARGET])
async def test_a_node_that_a_hung_job_holds_is_flushed_as_the_others_are(
    graph: Graph, disks: list[Disk], number: int, role: Role
) -> None:
    held = disks[number]
    graph.hold(held.node, "block job 'hung'", role, writes=role is Role.TARGET)
    await graph.close()
    assert all(disk.durable for disk in disks)
    assert [disk.driver.closed for disk in disks] == [disk is not held for disk in disks]
    assert list(graph) == [held.node]


@each_disk
async def test_a_disk_whose_flush_fails(graph: Graph, disks: list[Disk], number: int) -> None:
    disks[number].driver.fail("flush", errno.EIO, times=9)
    with pytest.raises(ExceptionGroup) as raised:
        await graph.close()
    (error,) = raised.value.exceptions
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert [disk.durable for disk in disks] == [at != number for at in range(3)]
    assert all(disk.driver.closed for disk in disks)


@each_disk
async def test_a_disk_that_hangs_does_not_keep_the_others_from_being_flushed(
    graph: Graph, disks: list[Disk], number: int, autojump_clock: MockClock
) -> None:
    disks[number].driver.hold("flush")
    with trio.move_on_after(1) as scope:
        await graph.close()
    assert scope.cancelled_caught
    assert [disk.durable for disk in disks] == [at != number for at in range(3)]


async def test_the_flushes_go_on_side_by_side(graph: Graph, disks: list[Disk]) -> None:
    """Slow disks together take as long as the slowest of them."""
    holds = [disk.driver.hold("flush") for disk in disks]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.close)
        await wait_all_tasks_blocked()
        assert [disk.flushes for disk in disks] == [1, 1, 1]
        for hold in holds:
            hold.release()
    assert all(disk.durable and disk.driver.closed for disk in disks)
