"""Nodes from options: children by role, what they inherit, and what stays after a failure."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Driver, Graph, Node, Role
from blockd.errors import BlockdError
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import ROOT, Common, Openers, Opening, open_node
from blockd.qmp.types.blockdev import BlockdevOptions, CacheOptions, FileOptions, NodeOptions
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

SIZE = 4096


class OverlayOptions(NodeOptions, kw_only=True):
    """An image with a backing file."""

    file: str | FileOptions
    backing: str | OverlayOptions | FileOptions
    broken: bool = False


class Subject:
    """A graph, and openers that note what they were given."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.common: dict[str, Common] = {}
        self.drivers: list[MemoryDriver] = []
        self.hang = trio.Event()
        self.openers: Openers = {FileOptions: self._file, OverlayOptions: self._overlay}

    async def _file(self, opening: Opening, options: FileOptions) -> Driver:
        self.common[options.filename] = opening.common
        if options.filename == "missing":
            raise BlockdError("Could not open 'missing'")
        if options.filename == "hanging":
            await self.hang.wait()
        self.drivers.append(MemoryDriver(SIZE, read_only=opening.common.read_only))
        return self.drivers[-1]

    async def _overlay(self, opening: Opening, options: OverlayOptions) -> Driver:
        file = await opening.child(Role.FILE, options.file)
        backing = await opening.child(Role.BACKING, options.backing)
        if options.broken:
            raise BlockdError("Image is broken")
        self.drivers.append(MemoryOverlay(SIZE, backing, file))
        return self.drivers[-1]

    async def open(self, options: NodeOptions) -> Node:
        return await open_node(self.openers, self.graph, options, owned=True)

    def names(self) -> list[str]:
        return [node.name for node in self.graph]


@pytest.fixture
def subject() -> Subject:
    return Subject()


def file(filename: str, **options: Any) -> FileOptions:
    return FileOptions(filename=filename, **options)


def overlay(name: str | None = "top", **options: Any) -> OverlayOptions:
    return OverlayOptions(
        node_name=name, **{"file": file("f"), "backing": file("b", node_name="base")} | options
    )


async def test_children_are_claimed_by_role_and_go_with_their_parent(subject: Subject) -> None:
    top = await subject.open(overlay())
    below = {node.name: node for node in subject.graph.standing.below(top)}
    assert len(below) == 2
    assert [claim.user for claim in below["base"].users.of(Role.BACKING)] == ["node 'top'"]
    with pytest.raises(BlockdError, match="node is used as backing hd of 'top'"):
        subject.graph.find_owned("base")
    await subject.graph.remove(top)
    assert subject.names() == []
    assert all(driver.closed for driver in subject.drivers)


async def test_a_child_by_name_stays(subject: Subject) -> None:
    base = await subject.open(file("b", node_name="base"))
    top = await subject.open(overlay(backing="base"))
    assert top.backing is base
    await subject.graph.remove(top)
    assert subject.names() == ["base"]
    assert not base.users


async def test_a_chain_is_made_from_one_set_of_options(subject: Subject) -> None:
    chain: Any = file("b", node_name="n0")
    for depth in range(1, 40):
        chain = overlay(f"n{depth}", backing=chain)
    node: Node | None = await subject.open(chain)
    names = []
    while node is not None:
        names.append(node.name)
        node = node.backing
    assert names == [f"n{depth}" for depth in reversed(range(40))]


async def test_children_inherit_what_they_do_not_say(subject: Subject) -> None:
    cache = CacheOptions(direct=True, no_flush=True)
    await subject.open(overlay(cache=cache, auto_read_only=True, discard="unmap"))
    assert subject.common["f"] == Common(
        read_only=False, auto_read_only=True, direct=True, flushes=False, unmap=True
    )
    # A backing file is not written, whoever writes to what stands on it.
    assert subject.common["b"] == Common(
        read_only=True, auto_read_only=False, direct=True, flushes=False, unmap=True
    )


async def test_children_keep_what_they_say(subject: Subject) -> None:
    own: dict[str, Any] = {
        "read_only": False,
        "auto_read_only": False,
        "cache": CacheOptions(direct=False),
        "discard": "ignore",
    }
    await subject.open(
        overlay(
            cache=CacheOptions(direct=True, no_flush=True),
            read_only=True,
            auto_read_only=True,
            file=file("f", **own),
            backing=file("b", **own),
        )
    )
    assert subject.common["f"] == subject.common["b"]
    assert subject.common["f"] == Common(
        read_only=False, auto_read_only=False, direct=False, flushes=False, unmap=False
    )


async def test_discards_are_kept_from_a_node_of_its_own_but_not_below(subject: Subject) -> None:
    await subject.open(file("alone", node_name="alone"))
    await subject.open(overlay())
    assert subject.common["alone"] == ROOT
    assert subject.common["f"].unmap


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (overlay(backing=file("missing")), "Could not open 'missing'"),
        (overlay(backing="nobody"), "Cannot find device='nobody' nor node-name='nobody'"),
        (overlay(backing=overlay("inner", backing=file("missing"))), "Could not open 'missing'"),
        (overlay(broken=True), "Image is broken"),
        (overlay(file=file("f", node_name="top")), "Duplicate nodes with node-name='top'"),
        (overlay("1"), "Invalid node-name: '1'"),
    ],
)
async def test_after_a_refusal_all_is_as_before(
    subject: Subject, options: OverlayOptions, message: str
) -> None:
    with pytest.raises(BlockdError) as raised:
        await subject.open(options)
    assert raised.value.message == message
    assert subject.names() == []
    assert all(driver.closed for driver in subject.drivers)


async def test_a_cancelled_opening_leaves_nothing(subject: Subject) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(subject.open, overlay(backing=file("hanging")))
        await wait_all_tasks_blocked()
        assert len(subject.drivers) == 1
        nursery.cancel_scope.cancel()
    assert subject.names() == []
    assert subject.drivers[0].closed


def test_each_driver_that_is_declared_has_its_opener() -> None:
    assert set(OPENERS) == set(get_args(BlockdevOptions))
