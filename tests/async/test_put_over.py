"""An overlay or a filter put on a node in use: who follows, who stays, what is refused, undoing."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.block import CopyOnReadDriver, Gate, Graph, Node, RawDriver, Role
from blockd.errors import BlockdError
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.watched_driver import WatchedDriver

SIZE = 4096
EXPORT = "an unnamed block device"


class Guest:
    """A user that follows, and writes one request after another."""

    def __init__(self, graph: Graph, node: Node, *, writes: bool = True) -> None:
        self.node = node
        self.gate = Gate()
        self.hold = graph.hold(node, EXPORT, writes=writes, follower=self)

    def quiesced(self) -> AbstractAsyncContextManager[None]:
        return self.gate.shut()

    def follow(self, node: Node) -> None:
        assert self.gate.closed
        self.node = node

    async def write(self, offset: int, data: bytes) -> None:
        await self.gate.enter()
        try:
            await self.node.write(offset, memoryview(data))
        finally:
            self.gate.leave()


@pytest.fixture
def graph() -> Graph:
    return Graph()


def add(graph: Graph, name: str, size: int = SIZE) -> Node:
    driver = WatchedDriver(size)
    driver.filename = f"/{name}.img"
    return graph.add(name, driver, owned=True)


def add_overlay(graph: Graph, name: str = "overlay", size: int = SIZE) -> Node:
    return graph.add(name, MemoryOverlay(size, None), owned=True)


def add_raw(graph: Graph, name: str, child: Node, size_bytes: int | None = None) -> Node:
    return graph.add(name, RawDriver(child, size_bytes=size_bytes), owned=True)


def memory_driver(node: Node) -> MemoryDriver:
    assert isinstance(node.driver, MemoryDriver)
    return node.driver


def written_to(node: Node) -> bytes:
    return bytes(memory_driver(node).data).rstrip(b"\0")


async def refusal(graph: Graph, top: Node, node: Node) -> str:
    """Why ``top`` can't be put over ``node``; nothing must have changed."""
    before = state(graph)
    with pytest.raises(BlockdError) as raised:
        async with graph.places.quiesced([node]):
            graph.places.put_over(top, node)
    assert state(graph) == before
    return raised.value.message


def state(graph: Graph) -> list[tuple[object, ...]]:
    return [
        (
            node.name,
            node.size_bytes,
            dict(node.driver.children),
            {(claim.user, claim.role, claim.access) for claim in node.users},
        )
        for node in graph
    ]


async def test_an_export_and_a_node_above_follow(graph: Graph) -> None:
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    raw = add_raw(graph, "raw", disk)
    below, above = Guest(graph, disk), Guest(graph, raw)
    async with graph.places.quiesced([disk]):
        graph.places.put_over(overlay, disk)
    assert (below.node, above.node) == (overlay, raw)
    assert raw.driver.children == {Role.FILE: overlay}
    assert overlay.backing is disk
    await below.write(0, b"one")
    await above.write(512, b"two")
    assert written_to(disk) == b""
    assert written_to(overlay) == b"one".ljust(512, b"\0") + b"two"
    assert [claim.role for claim in disk.users] == [Role.BACKING]


async def test_what_a_read_above_is_about_to_write_comes_before(graph: Graph) -> None:
    base = add(graph, "base")
    await base.write(0, memoryview(b"old"))
    disk = graph.add("disk", MemoryOverlay(SIZE, base), owned=True)
    cor = graph.add("cor", CopyOnReadDriver(disk), owned=True)
    overlay = add_overlay(graph)
    copied: list[int] = []

    async def put_over() -> None:
        async with graph.places.quiesced([disk]):
            copied.append(memory_driver(disk).counts["write"])
            graph.places.put_over(overlay, disk)

    with memory_driver(base).hold("read") as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cor.read, 0, memoryview(bytearray(512)))
            await hold.reached.wait()
            nursery.start_soon(put_over)
            await wait_all_tasks_blocked()
            assert not copied
            hold.release()
    assert copied == [1]
    assert memory_driver(disk).counts["write"] == 1


async def test_a_job_stays(graph: Graph) -> None:
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    job = graph.hold(disk, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    async with graph.places.quiesced([disk]):
        graph.places.put_over(overlay, disk)
    assert {claim.role for claim in disk.users} == {Role.SOURCE, Role.BACKING}
    assert not overlay.users
    job.release()


async def test_a_filter_keeps_what_it_stands_on(graph: Graph) -> None:
    disk = add(graph, "disk")
    guest = Guest(graph, disk)
    other = add_raw(graph, "other", disk)
    top = add_raw(graph, "filter", disk)
    async with graph.places.quiesced([disk]):
        graph.places.put_over(top, disk)
    assert guest.node is top
    assert top.driver.children == {Role.FILE: disk}
    assert other.driver.children == {Role.FILE: top}
    await guest.write(0, b"data")
    assert written_to(disk) == b"data"


async def test_a_chain_grows_under_its_users(graph: Graph) -> None:
    disk = add(graph, "disk")
    guest = Guest(graph, disk)
    top = disk
    for number in range(30):
        await guest.write(number * 16, b"%02d" % number)
        overlay = add_overlay(graph, f"o{number}")
        async with graph.places.quiesced([top]):
            graph.places.put_over(overlay, top)
        top = overlay
    view = memoryview(bytearray(SIZE))
    await guest.node.read(0, view)
    assert bytes(view).split(b"\0" * 14)[:30] == [b"%02d" % number for number in range(30)]


async def test_a_chain_grows_as_long_as_it_can_be_read(graph: Graph) -> None:
    top = add(graph, "disk")
    for number in range(limits.NODE_LEVELS - 1):
        overlay = add_overlay(graph, f"o{number}")
        async with graph.places.quiesced([top]):
            graph.places.put_over(overlay, top)
        top = overlay
    message = await refusal(graph, add_overlay(graph), top)
    assert message == f"More than {limits.NODE_LEVELS} nodes would stand on each other"
    await top.read(0, memoryview(bytearray(SIZE)))
    await top.write(5, memoryview(b"x"))


async def test_undoing_gives_everybody_back_what_he_had(graph: Graph) -> None:
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    raw = add_raw(graph, "raw", disk)
    guest = Guest(graph, disk)
    above = add_raw(graph, "above", overlay)
    before = state(graph)
    async with graph.places.quiesced([disk]):
        undo = graph.places.put_over(overlay, disk)
        assert state(graph) != before
        undo()
        assert state(graph) == before
    assert guest.node is disk
    assert raw.driver.children == {Role.FILE: disk}
    assert above.driver.children == {Role.FILE: overlay}
    guest.hold.release()
    assert not overlay.backing


async def test_an_overlay_s_own_stack_stays_as_it_is(graph: Graph) -> None:
    """A node above the overlay does not end up below it."""
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    above = add_raw(graph, "above", overlay)
    async with graph.places.quiesced([disk]):
        graph.places.put_over(overlay, disk)
    assert above.driver.children == {Role.FILE: overlay}
    assert list(graph.standing.below(above)) == [overlay, disk]


async def test_no_write_is_lost_on_the_way(graph: Graph) -> None:
    """One in flight ends where it was going; one that comes meanwhile goes to the new node."""
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    raw = add_raw(graph, "raw", disk)
    guest = Guest(graph, raw)
    assert isinstance(disk.driver, MemoryDriver)
    async with trio.open_nursery() as nursery:
        with disk.driver.hold("write") as held:
            nursery.start_soon(guest.write, 0, b"early")
            await held.reached.wait()

            async def cover() -> None:
                async with graph.places.quiesced([disk]):
                    graph.places.put_over(overlay, disk)

            nursery.start_soon(cover)
            await wait_all_tasks_blocked()
            nursery.start_soon(guest.write, 512, b"late")
            await wait_all_tasks_blocked()
            assert overlay.backing is None
    assert written_to(disk) == b"early"
    assert written_to(overlay).lstrip(b"\0") == b"late"


async def test_a_source_is_stopped_before_the_target_that_its_writes_wait_for(graph: Graph) -> None:
    """Here the target stands on the source, as where a guest's old data is kept in an overlay."""
    source = add(graph, "a-source")
    target = graph.add("b-target", MemoryOverlay(SIZE, source), owned=True)
    other = add(graph, "c-other")
    graph.hold(source, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    graph.hold(target, "block job 'j'", Role.TARGET, writes=True)
    graph.hold(other, "block job 'k'", Role.SOURCE, writes=False, alone=True)
    assert isinstance(target.driver, MemoryDriver)
    assert isinstance(source.driver, MemoryDriver)
    async with trio.open_nursery() as nursery:
        with source.driver.hold("write") as held:
            nursery.start_soon(source.write, 0, memoryview(b"new"))
            await held.reached.wait()

            async def stop_all() -> None:
                async with graph.places.quiesced([target, other, source]):
                    pass

            nursery.start_soon(stop_all)
            await wait_all_tasks_blocked()
            await target.write(0, memoryview(b"old"))
    assert written_to(target) == b"old"


async def test_a_read_in_flight_ends_before_its_node_is_closed(graph: Graph) -> None:
    disk = add(graph, "disk")
    assert isinstance(disk.driver, MemoryDriver)
    view = memoryview(bytearray(b"?" * 4))
    async with trio.open_nursery() as nursery:
        with disk.driver.hold("read") as held:
            nursery.start_soon(disk.read, 0, view)
            await held.reached.wait()
            nursery.start_soon(graph.remove, disk)
            await wait_all_tasks_blocked()
            assert not disk.driver.closed
            held.release()
    assert disk.driver.closed
    assert bytes(view) == bytes(4)


# --- what is refused --------------------------------------------------------------------------


async def test_a_read_only_overlay_under_a_writer(graph: Graph) -> None:
    disk = add(graph, "disk")
    driver = MemoryOverlay(SIZE, None)
    driver.read_only = True
    overlay = graph.add("overlay", driver, owned=True)
    guest = Guest(graph, disk)
    assert await refusal(graph, overlay, disk) == "Block node is read-only"
    assert guest.node is disk


async def test_an_overlay_that_is_smaller_than_what_is_used(graph: Graph) -> None:
    disk, small = add(graph, "disk"), add_overlay(graph, "small", SIZE // 2)
    guest = Guest(graph, disk)
    assert await refusal(graph, small, disk) == (
        "Node 'small' is smaller than node 'disk', which is in use"
    )
    guest.hold.release()
    async with graph.places.quiesced([disk]):
        graph.places.put_over(small, disk)


async def test_an_overlay_that_is_larger(graph: Graph) -> None:
    disk, large = add(graph, "disk"), add_overlay(graph, "large", 2 * SIZE)
    raw, part = add_raw(graph, "raw", disk), add_raw(graph, "part", disk, size_bytes=512)
    raw.bitmaps.add("b", 512)
    job = graph.hold(raw, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    assert await refusal(graph, large, disk) == (
        "Node 'large' is larger than node 'disk', and a job uses node 'raw' on top of that"
    )
    job.release()
    async with graph.places.quiesced([disk]):
        graph.places.put_over(large, disk)
    assert (raw.size_bytes, part.size_bytes) == (2 * SIZE, 512)
    await raw.write(SIZE, memoryview(b"data"))
    assert raw.bitmaps.get("b").usable_bits().count_bytes == 512


async def test_what_lies_below_a_job_s_target_stays(graph: Graph) -> None:
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    raw = add_raw(graph, "raw", disk)
    job = graph.hold(raw, "block job 'j'", Role.TARGET, writes=True)
    assert await refusal(graph, overlay, disk) == (
        "Node 'raw' is busy: block device is in use by block job: backup"
    )
    job.release()


async def test_a_node_that_shows_a_job_is_not_in_the_way(graph: Graph) -> None:
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    shown = add_raw(graph, "filter", disk)
    job = "block job 'j'"
    graph.hold(disk, job, Role.SOURCE, writes=False, alone=True)
    graph.hold(shown, job, Role.TARGET, writes=False)
    async with graph.places.quiesced([disk]):
        graph.places.put_over(overlay, disk)
    assert shown.driver.children == {Role.FILE: overlay}


async def test_a_conflict_of_users(graph: Graph) -> None:
    """What stands on the overlay already does not share it with a writer."""
    disk, overlay = add(graph, "disk"), add_overlay(graph)
    left, right = add_raw(graph, "left", overlay), add_raw(graph, "right", disk)
    graph.hold(left, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    Guest(graph, right)
    assert await refusal(graph, overlay, disk) == (
        "Permission conflict on node 'overlay': permissions 'write' are both required by "
        "node 'right' (uses node 'overlay' as 'file' child) and unshared by "
        "node 'left' (uses node 'overlay' as 'file' child)."
    )
