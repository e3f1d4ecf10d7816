"""Nodes by name: which names are taken, who stands on whom, who may go, who is in whose way."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Graph, Node, Perm, RawDriver, Role
from blockd.errors import BlockdError
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.watched_driver import WatchedDriver

EXPORT = "an unnamed block device"


@pytest.fixture
def graph() -> Graph:
    return Graph()


def add(graph: Graph, name: str | None, *, owned: bool = True, read_only: bool = False) -> Node:
    driver = WatchedDriver(4096, read_only=read_only)
    driver.filename = f"/{name}.img"
    return graph.add(name, driver, owned=owned)


def add_raw(graph: Graph, name: str, child: Node) -> Node:
    return graph.add(name, RawDriver(child), owned=True)


def add_overlay(graph: Graph, name: str, backing: Node, file: Node) -> Node:
    return graph.add(name, MemoryOverlay(4096, backing, file), owned=True)


def memory_driver(node: Node) -> WatchedDriver:
    assert isinstance(node.driver, WatchedDriver)
    return node.driver


def refusal(graph: Graph, name: str) -> str:
    """Why the administrator may not delete the node."""
    with pytest.raises(BlockdError) as raised:
        graph.find_owned(name)
    return raised.value.message


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "Z9", "disk-0.img_1", "x" * 31])
def test_good_names(graph: Graph, name: str) -> None:
    graph.check_name(name)
    assert add(graph, name).name == name
    assert graph.get(name).name == name


@pytest.mark.parametrize(
    "name", ["", "1a", "#a", "#block001", "a b", "-n", "é", "aé", "a\n", "a/b", ".a", "_a"]
)
def test_bad_names(graph: Graph, name: str) -> None:
    with pytest.raises(BlockdError) as raised:
        add(graph, name)
    assert raised.value.message == f"Invalid node-name: '{name}'"
    assert list(graph) == []


def test_names_that_are_too_long_or_taken(graph: Graph) -> None:
    with pytest.raises(BlockdError, match=r"^Node name too long$"):
        graph.check_name("x" * 32)
    add(graph, "n")
    with pytest.raises(BlockdError, match=r"^Duplicate nodes with node-name='n'$"):
        graph.check_name("n")


def test_nodes_without_a_name_get_one_that_no_user_can_give(graph: Graph) -> None:
    names = [add(graph, None).name for _ in range(1200)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("#block") for name in names)


def test_nodes_are_listed_newest_first(graph: Graph) -> None:
    for name in "abc":
        add(graph, name)
    assert [node.name for node in graph] == ["c", "b", "a"]


def test_an_unknown_node_is_named_as_the_peer_does(graph: Graph) -> None:
    with pytest.raises(BlockdError, match=r"^Cannot find device='' nor node-name='x'$"):
        graph.get("x")
    with pytest.raises(BlockdError, match=r"^Cannot find device='x' nor node-name='x'$"):
        graph.get("x", device="x")
    assert graph.find("x") is None
    assert refusal(graph, "x") == "Failed to find node with node-name='x'"


def test_a_hidden_node_is_there_but_not_for_commands(graph: Graph) -> None:
    node = graph.add(None, WatchedDriver(4096), owned=False, hidden=True)
    assert list(graph) == [node]
    assert graph.find(node.name) is None
    with pytest.raises(BlockdError, match="Cannot find device=''"):
        graph.get(node.name)
    assert refusal(graph, node.name) == f"Node {node.name} is not owned by the monitor"


def test_storage_under_two_names_is_found_out(graph: Graph) -> None:
    node = add(graph, "n")
    other = WatchedDriver(4096)
    other.filename = "/link.img"
    graph.check_storage(other)
    node.driver.identity = other.identity = (1, 2)
    with pytest.raises(BlockdError, match=r"^'/link\.img' is in use: node 'n' stands on it$"):
        graph.check_storage(other)
    node.driver.identity = (1, 3)
    graph.check_storage(other)


# --- who may be deleted -----------------------------------------------------------------------


def test_a_node_that_is_used_stays(graph: Graph) -> None:
    node = add(graph, "n")
    assert graph.find_owned("n") is node
    hold = graph.hold(node, EXPORT, writes=True)
    assert refusal(graph, "n") == "Node n is in use"
    hold.release()
    hold = graph.hold(node, "block job 'j'", Role.SOURCE, writes=False)
    assert refusal(graph, "n") == "Block device n is in use"
    hold.release()
    hold = graph.hold(node, "block job 'j'", Role.TARGET, writes=True)
    assert refusal(graph, "n") == "Node 'n' is busy: block device is in use by block job: backup"
    hold.release()
    assert graph.find_owned("n") is node


def test_a_node_below_another_stays(graph: Graph) -> None:
    child = add(graph, "child")
    add_raw(graph, "top", child)
    assert refusal(graph, "child") == "Block device child is in use"
    own = add(graph, None, owned=False)
    add_raw(graph, "other", own)
    assert refusal(graph, own.name) == f"Node {own.name} is not owned by the monitor"


def test_a_hold_is_released_once(graph: Graph) -> None:
    node = add(graph, "n")
    hold = graph.hold(node, EXPORT, writes=False)
    other = graph.hold(node, EXPORT, writes=False)
    hold.release()
    hold.release()
    assert node.users
    other.release()
    assert not node.users


# --- deleting ---------------------------------------------------------------------------------


async def test_what_stood_below_a_node_alone_goes_with_it(graph: Graph) -> None:
    own, named = add(graph, None, owned=False), add(graph, "named")
    middle = add_raw(graph, "middle", own)
    top = add_raw(graph, "top", middle)
    beside = add_raw(graph, "beside", named)
    assert list(graph.standing.below(top)) == [middle, own]

    await graph.remove(top)
    assert [node.name for node in graph] == ["beside", "middle", "named", own.name]
    assert not middle.users
    await graph.remove(middle)
    assert memory_driver(own).closed
    await graph.remove(beside)
    assert not memory_driver(named).closed
    assert list(graph) == [named]
    add(graph, "top")


async def test_a_child_of_two_parents_goes_with_the_last(graph: Graph) -> None:
    child = add(graph, None, owned=False)
    first, second = add_raw(graph, "first", child), add_raw(graph, "second", child)
    await graph.remove(first)
    assert not memory_driver(child).closed
    await graph.remove(second)
    assert memory_driver(child).closed
    assert list(graph) == []


async def test_a_deleted_node_is_flushed_before_it_is_closed(graph: Graph) -> None:
    node, reader = add(graph, "n"), add(graph, "ro", read_only=True)
    await node.write(0, memoryview(b"data"))
    await graph.remove(node)
    await graph.remove(reader)
    assert memory_driver(node).durable[:4] == b"data"
    assert memory_driver(node).closed
    assert memory_driver(reader).seen == []


async def test_a_flush_that_fails_is_told_but_the_node_goes(graph: Graph) -> None:
    child = add(graph, None, owned=False)
    top = add_raw(graph, "top", child)
    memory_driver(child).fail("flush", errno.EIO, times=9)
    with pytest.raises(OSError, match="Input/output error"):
        await graph.remove(top)
    assert list(graph) == []
    assert memory_driver(child).closed


async def test_a_child_that_fails_keeps_no_other_one(graph: Graph) -> None:
    backing, file = add(graph, None, owned=False), add(graph, None, owned=False)
    top = add_overlay(graph, "top", backing, file)
    memory_driver(file).fail("flush", errno.EIO, times=9)
    with pytest.raises(OSError, match="Input/output error"):
        await graph.remove(top)
    assert list(graph) == []
    assert memory_driver(file).closed
    assert memory_driver(backing).closed


async def test_a_node_that_has_gone_is_not_stood_on(graph: Graph) -> None:
    child = add(graph, "child")
    driver = RawDriver(child)
    await graph.remove(child)
    with pytest.raises(BlockdError, match="'child' has been removed meanwhile"):
        graph.add("top", driver, owned=True)
    add(graph, "child")
    assert [node.name for node in graph] == ["child"]


async def test_cancelling_a_deletion_leaves_no_node_half_there(graph: Graph) -> None:
    child = add(graph, None, owned=False)
    top = add_raw(graph, "top", child)
    memory_driver(child).hold("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.remove, top)
        await wait_all_tasks_blocked()
        assert graph.find("top") is None
        nursery.cancel_scope.cancel()
    assert list(graph) == []
    assert memory_driver(child).closed


async def test_the_end_closes_all_nodes_from_the_top(graph: Graph) -> None:
    first, second = add(graph, "first"), add(graph, "second")
    add_raw(graph, "top", add_raw(graph, "middle", first))
    memory_driver(first).fail("flush", errno.EIO, times=9)
    memory_driver(second).fail("flush", errno.ENOSPC, times=9)
    with pytest.raises(ExceptionGroup) as raised:
        await graph.close()
    told = {error.errno for error in raised.value.exceptions if isinstance(error, OSError)}
    assert told == {errno.EIO, errno.ENOSPC}
    assert memory_driver(first).closed
    assert memory_driver(second).closed
    assert list(graph) == []


async def test_the_end_leaves_open_what_somebody_still_uses(graph: Graph) -> None:
    used, free = add(graph, "used"), add(graph, "free")
    graph.hold(used, "block job 'j'", Role.TARGET, writes=True)
    await graph.close()
    assert list(graph) == [used]
    assert memory_driver(free).closed


# --- who is in whose way ----------------------------------------------------------------------


def test_writers_share_a_node_but_for_one_that_wants_to_be_alone(graph: Graph) -> None:
    file = add(graph, "file")
    left, right = add_raw(graph, "left", file), add_raw(graph, "right", file)
    export = graph.hold(left, EXPORT, writes=True)
    job = graph.hold(left, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    assert file.users

    with pytest.raises(BlockdError) as raised:
        graph.hold(right, EXPORT, writes=True)
    assert raised.value.message == (
        "Permission conflict on node 'file': permissions 'write' are both required by "
        "node 'right' (uses node 'file' as 'file' child) and unshared by "
        "node 'left' (uses node 'file' as 'file' child)."
    )
    with pytest.raises(BlockdError, match=r"required by an unnamed block device .* 'root' child"):
        graph.hold(file, EXPORT, writes=True)
    reader = graph.hold(right, EXPORT, writes=False)

    reader.release()
    job.release()
    graph.hold(right, EXPORT, writes=True).release()
    export.release()


def test_one_who_wants_to_be_alone_is_refused_where_others_write(graph: Graph) -> None:
    file = add(graph, "file")
    left, right = add_raw(graph, "left", file), add_raw(graph, "right", file)
    export = graph.hold(right, EXPORT, writes=True)
    before = len(file.users.of(Role.FILE))
    with pytest.raises(BlockdError, match=r"required by node 'right' .* unshared by node 'left'"):
        graph.hold(left, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    assert not left.users
    assert len(file.users.of(Role.FILE)) == before
    export.release()
    graph.hold(left, "block job 'j'", Role.SOURCE, writes=False, alone=True).release()


def test_nobody_writes_to_what_is_read_only_or_stands_on_it(graph: Graph) -> None:
    child = add(graph, "child", read_only=True)
    top = add_raw(graph, "top", child)
    for node in (child, top):
        with pytest.raises(BlockdError, match=r"^Block node is read-only$"):
            graph.hold(node, EXPORT, writes=True)
        graph.hold(node, EXPORT, writes=False).release()
    assert not top.users


def test_who_writes_to_an_overlay_does_not_write_to_its_backing_file(graph: Graph) -> None:
    base = add_raw(graph, "base", add(graph, "base-file", read_only=True))
    file = add(graph, "file")
    top = add_overlay(graph, "top", base, file)
    graph.hold(top, EXPORT, writes=True)
    (on_file,), (on_base,) = file.users.of(Role.FILE), base.users.of(Role.BACKING)
    assert (on_file.access.needs, on_base.access.needs) == (Perm.WRITE, Perm.NONE)
    with pytest.raises(BlockdError, match="Block node is read-only"):
        graph.hold(base, EXPORT, writes=True)


def test_below_are_all_children_each_once(graph: Graph) -> None:
    base, file = add(graph, "base"), add(graph, "file")
    middle = add_overlay(graph, "middle", base, file)
    beside = add_raw(graph, "beside", base)
    top = add_overlay(graph, "top", middle, beside)
    assert [node.name for node in graph.standing.below(top)] == ["beside", "base", "middle", "file"]
    assert (top.backing, middle.backing, base.backing) == (middle, base, None)


def test_what_a_job_backs_up_no_other_job_overwrites(graph: Graph) -> None:
    node = add(graph, "n")
    source = graph.hold(node, "block job 'j'", Role.SOURCE, writes=False, alone=True)
    graph.hold(node, EXPORT, writes=True).release()
    with pytest.raises(BlockdError, match=r"unshared by block job 'j' .uses node 'n' as 'source'"):
        graph.hold(node, "block job 'k'", Role.TARGET, writes=True)
    source.release()
    graph.hold(node, "block job 'k'", Role.TARGET, writes=True).release()
