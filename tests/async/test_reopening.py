"""Other drivers for nodes: when they come, what is carried over, and what a refusal leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import (
    CopyOnReadDriver,
    FileDriver,
    Graph,
    Node,
    RawDriver,
    Reopening,
    Role,
    reopen_file,
)
from blockd.block.drivers.locking import lock_image
from blockd.errors import BlockdError, WouldBlock
from tests.helpers.driver_subjects import open_image
from tests.helpers.watched_driver import WatchedDriver

SIZE = 64 * 1024
EXPORT = "an unnamed block device"
OPTIONS = {"auto_read_only": False, "direct": False, "unmap": True, "flushes": True}


def memory(letter: bytes, size: int = SIZE, *, read_only: bool = False) -> WatchedDriver:
    driver = WatchedDriver(letter * size, read_only=read_only)
    driver.filename = f"/{letter.decode()}.img"
    driver.nowait = lambda _: True
    return driver


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
def old() -> WatchedDriver:
    return memory(b"o")


@pytest.fixture
def node(graph: Graph, old: WatchedDriver) -> Node:
    return graph.add("node", old, owned=True)


async def reopen(graph: Graph, *pairs: tuple[Node, WatchedDriver | RawDriver]) -> None:
    reopening = Reopening(graph)
    try:
        for node, driver in pairs:
            await reopening.plan(node, driver)
        await reopening.commit()
    finally:
        await reopening.abandon()


async def first_byte(node: Node) -> bytes:
    view = memoryview(bytearray(1))
    await node.read(0, view)
    return bytes(view)


async def test_all_of_none_is_done(graph: Graph) -> None:
    await reopen(graph)


@pytest.mark.parametrize("operation", ["read", "write", "flush", "discard", "allocation"])
async def test_it_waits_for_what_is_under_way_and_new_requests_wait_for_it(
    graph: Graph, node: Node, old: WatchedDriver, operation: str
) -> None:
    calls = {
        "read": lambda: node.read(0, memoryview(bytearray(1))),
        "write": lambda: node.write(0, memoryview(b"w")),
        "flush": node.flush,
        "discard": lambda: node.discard(0, 1),
        "allocation": lambda: node.allocation(0, 1),
    }
    new = memory(b"n")
    # A flush also holds the one that reopening begins with.
    with old.hold(operation) as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls[operation])
            await hold.reached.wait()
            nursery.start_soon(reopen, graph, (node, new))
            await wait_all_tasks_blocked()
            assert not old.closed
            nursery.start_soon(calls[operation])
            await wait_all_tasks_blocked()
            if operation != "flush":
                with pytest.raises(WouldBlock):
                    node.write_nowait(0, memoryview(b"x"))
            if operation in ("read", "allocation"):
                with pytest.raises(WouldBlock):
                    node.read_nowait(0, memoryview(bytearray(1)))
            hold.release()
    assert old.closed
    assert not new.closed
    if operation != "flush":
        assert (old.counts[operation], new.counts[operation]) == (1, 1)


async def test_what_stands_above_asks_for_the_space_only_afterwards(
    graph: Graph, node: Node
) -> None:
    top = graph.add("top", CopyOnReadDriver(node), owned=True)
    told: list[int] = []

    async def ask() -> None:
        told.append(await top.allocated_bytes())

    async with trio.open_nursery() as nursery, node.at_rest():
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert not told
    assert told


async def test_nobody_above_notices(graph: Graph, node: Node) -> None:
    top = graph.add("top", RawDriver(node), owned=True)
    hold = graph.hold(top, EXPORT, writes=True)
    bitmap = top.bitmaps.add("b", 512)
    await top.write(0, memoryview(b"x"))
    await reopen(graph, (node, memory(b"n")))
    assert await first_byte(top) == b"n"
    view = memoryview(bytearray(1))
    top.read_nowait(0, view)
    top.write_nowait(512, view)
    assert bitmap.count_bytes == 1024
    assert top.accounts.write.operations == 1
    hold.release()


async def test_a_node_above_follows_another_size(graph: Graph, node: Node) -> None:
    top = graph.add("top", RawDriver(node), owned=True)
    bitmaps = [each.bitmaps.add("b", 512) for each in (node, top)]
    await reopen(graph, (node, memory(b"n", 2 * SIZE)))
    assert (node.size_bytes, top.size_bytes) == (2 * SIZE, 2 * SIZE)
    assert all(bitmap.copy_bits().size_bytes == 2 * SIZE for bitmap in bitmaps)


async def refused(graph: Graph, *pairs: tuple[Node, WatchedDriver | RawDriver]) -> str:
    before = {each: (each.driver, each.size_bytes, each.read_only) for each in graph}
    with pytest.raises(BlockdError) as raised:
        await reopen(graph, *pairs)
    assert {each: (each.driver, each.size_bytes, each.read_only) for each in graph} == before
    return raised.value.message


async def test_users_in_the_way_keep_all_as_it_was(graph: Graph, node: Node) -> None:
    other = graph.add("other", memory(b"a"), owned=True)
    top = graph.add("top", RawDriver(node), owned=True)
    hold = graph.hold(top, EXPORT, writes=True)
    drivers = memory(b"1"), memory(b"2", read_only=True)
    message = await refused(graph, (other, drivers[0]), (node, drivers[1]))
    assert message == "Read-only block node 'node' cannot support read-write users"
    assert all(driver.closed for driver in drivers)

    read_only = graph.add("ro", memory(b"r", read_only=True), owned=True)
    pairs = ((other, memory(b"1")), (top, RawDriver(read_only)))
    assert await refused(graph, *pairs) == "Block node is read-only"
    assert not read_only.users
    hold.release()
    await reopen(graph, (top, RawDriver(read_only)))
    assert not node.users
    assert await first_byte(top) == b"r"


async def test_the_size_that_a_guest_knows_stays(graph: Graph, node: Node) -> None:
    top = graph.add("top", RawDriver(node), owned=True)
    graph.hold(top, EXPORT, writes=False)
    message = await refused(graph, (node, memory(b"n", SIZE - 512)))
    assert "permissions 'resize'" in message
    assert "unshared by node 'top'" in message


async def test_two_sizes_at_once_are_too_many(graph: Graph, node: Node) -> None:
    top = graph.add("top", RawDriver(node), owned=True)
    window = RawDriver(node, offset_bytes=SIZE - 512)
    message = await refused(graph, (node, memory(b"n", 512)), (top, window))
    assert message.startswith("Node 'node' gets another size: reopen it first, and node 'top'")


async def test_a_failing_flush_keeps_all_as_it_was(
    graph: Graph, node: Node, old: WatchedDriver
) -> None:
    new = memory(b"n")
    old.fail("flush", errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await reopen(graph, (node, new))
    assert (node.driver, new.closed, old.closed) == (old, True, False)
    assert await first_byte(node) == b"o"


async def test_where_the_new_driver_can_not_go_on_nothing_stays_open_but_it(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = graph.add(None, memory(b"c"), owned=False)
    top = graph.add("top", RawDriver(own), owned=True)
    new = memory(b"n")

    async def resume() -> None:
        raise BlockdError("the storage is not as it was left")

    monkeypatch.setattr(new, "resume", resume)
    with pytest.raises(BlockdError, match="not as it was left"):
        await reopen(graph, (top, new))
    assert (top.driver, top.read_only, new.closed) == (new, True, False)
    assert own not in list(graph)


async def test_of_two_plans_for_a_node_the_later_one_counts(graph: Graph, node: Node) -> None:
    first, second = memory(b"1"), memory(b"2")
    await reopen(graph, (node, first), (node, second))
    assert first.closed
    assert await first_byte(node) == b"2"


async def test_a_child_made_for_the_node_goes_when_nobody_needs_it(graph: Graph) -> None:
    own = graph.add(None, memory(b"c"), owned=False)
    top = graph.add("top", RawDriver(own), owned=True)
    await reopen(graph, (top, RawDriver(own)))
    assert graph.find(own.name) is own
    named = graph.add("named", memory(b"d"), owned=True)
    await reopen(graph, (top, RawDriver(named)))
    assert graph.find(own.name) is None
    await reopen(graph, (top, RawDriver(graph.add("other", memory(b"e"), owned=True))))
    assert graph.find("named") is named


async def test_a_child_of_two_goes_once_when_both_leave_it(graph: Graph) -> None:
    child = graph.add(None, memory(b"c"), owned=False)
    other = graph.add("other", memory(b"o"), owned=True)
    first, second = (graph.add(name, RawDriver(child), owned=True) for name in ("a", "b"))
    await reopen(graph, (first, RawDriver(other)), (second, RawDriver(other)))
    assert child not in list(graph)
    assert await first_byte(first) == await first_byte(second) == b"o"


@pytest.mark.parametrize("role", [Role.SOURCE, Role.TARGET])
async def test_a_job_keeps_what_it_has(graph: Graph, node: Node, role: Role) -> None:
    top = graph.add("top", RawDriver(node), owned=True)
    reopening = Reopening(graph)
    reopening.check_free(node)
    hold = graph.hold(top, "block job 'j'", role, writes=False)
    for each in (node, top):
        with pytest.raises(BlockdError, match="Node 'top' is busy"):
            reopening.check_free(each)
    hold.release()


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[FileDriver]:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    driver = open_image(path)
    yield driver
    await driver.close()


def lockable(path: str) -> bool:
    """Whether another program could write to the image."""
    fd = os.open(path, os.O_RDWR)
    try:
        lock_image(fd, path, read_only=False)
    except BlockdError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.parametrize("direct", [False, True])
async def test_the_image_is_held_all_the_time(file: FileDriver, *, direct: bool) -> None:
    again = reopen_file(file, read_only=False, **OPTIONS | {"direct": direct})
    assert again.direct is direct
    await again.write(0, memoryview(b"x" * 512))
    await again.close()
    assert not lockable(file.filename)


async def test_it_is_the_same_file_whatever_its_name_means(file: FileDriver) -> None:
    path = Path(file.filename)
    path.rename(path.with_name("moved"))
    path.write_bytes(b"another")
    again = reopen_file(file, read_only=True, **OPTIONS)
    assert (again.identity, again.size_bytes) == (file.identity, SIZE)
    await again.close()


async def test_data_that_was_lost_stays_lost(
    file: FileDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await file.flush()
    again = reopen_file(file, read_only=False, **OPTIONS)
    again.take_over(file)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await again.flush()
    await again.close()
