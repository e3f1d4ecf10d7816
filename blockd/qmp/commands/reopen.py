"""blockdev-reopen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from msgspec import UNSET

from blockd.block import Driver, FileDriver, Graph, Node, Reopening, Role, reopen_file
from blockd.block.qcow2 import Qcow2Driver
from blockd.errors import BlockdError
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.commands.openers.files import open_null, open_raw
from blockd.qmp.commands.openers.filters import open_throttle
from blockd.qmp.opening import ROOT, Common, Opening
from blockd.qmp.services import Services
from blockd.qmp.types.block import BlockdevReopen
from blockd.qmp.types.blockdev import (
    FileOptions,
    HostDeviceOptions,
    NodeOptions,
    NullOptions,
    Qcow2Options,
    RawOptions,
    ThrottleOptions,
)


async def blockdev_reopen(services: Services, arguments: BlockdevReopen) -> None:
    graph = services.graph
    reopening = Reopening(graph)
    try:
        for options in arguments.options:
            node = _find(graph, options)
            await _plan(reopening, graph, node, options, ROOT)
        await reopening.commit()
        for node in graph:
            # Some may stand on other images now.
            await graph.archive.keep(node)
    except BaseException:
        with trio.CancelScope(shield=True):
            await reopening.abandon()
        raise


def _find(graph: Graph, options: NodeOptions) -> Node:
    if options.node_name is None:
        raise BlockdError("node-name not specified")
    node = graph.find(options.node_name)
    if node is None:
        raise BlockdError(f"Failed to find node with node-name='{options.node_name}'")
    if node.name.startswith("#"):
        # A name of ours is no option: the node is reopened along with the one that it is for.
        raise BlockdError("Cannot change the option 'node-name'")
    return node


async def _plan(
    reopening: Reopening, graph: Graph, node: Node, options: NodeOptions, inherited: Common
) -> None:
    reopening.check_free(node)
    driver = node.driver
    if options.__struct_config__.tag != driver.name:
        raise BlockdError("Cannot change the option 'driver'")
    if (reopener := _REOPENERS.get(type(options))) is None:
        raise BlockdError(
            f"Block format '{driver.name}' used by node '{node.name}' does not support reopening "
            "files"
        )
    opened = _Opened(reopening, graph, node, inherited.overridden(options))
    await reopening.plan(node, await reopener(opened, options))


class _Opened(Opening):
    """A node that is open, and is being opened in another way."""

    def __init__(self, reopening: Reopening, graph: Graph, node: Node, common: Common) -> None:
        super().__init__(OPENERS, graph, None, common)
        self.node = node
        self._reopening = reopening

    async def child(self, role: Role, reference: str | NodeOptions) -> Node:
        """A node that is there; one that was made for this one takes its ``reference`` options."""
        if isinstance(reference, str):
            child = self.graph.get(reference)
            self._reopening.check_no_cycle(self.node, role, child)
            return child
        children = self._reopening.children(self.node)
        if role not in children:
            raise BlockdError(f"Cannot change the option '{role.value}'")
        child = children[role]
        if self.graph.is_owned(child):
            raise BlockdError(f"Cannot change the option '{role.value}.driver'")
        if reference.node_name not in (None, child.name):
            raise BlockdError("Cannot change the option 'node-name'")
        inherited = self.common.inherited(role)
        await _plan(self._reopening, self.graph, child, reference, inherited)
        return child

    def planned(self, node: Node) -> Driver:
        """The driver that ``node`` is to have."""
        return self._reopening.driver(node)


async def _reopen_file(opened: _Opened, options: FileOptions | HostDeviceOptions) -> Driver:
    driver, common = opened.node.driver, opened.common
    assert isinstance(driver, FileDriver)
    if options.filename != driver.filename:
        raise BlockdError("Cannot change the option 'filename'")
    return await trio.to_thread.run_sync(
        lambda: reopen_file(
            driver,
            read_only=common.read_only,
            auto_read_only=common.auto_read_only,
            direct=common.direct,
            unmap=common.unmap,
            flushes=common.flushes,
        )
    )


async def _reopen_qcow2(opened: _Opened, options: Qcow2Options) -> Driver:
    driver, common = opened.node.driver, opened.common
    assert isinstance(driver, Qcow2Driver)
    file = await opened.child(Role.FILE, options.file)
    _check_same(opened, Role.FILE, file)
    if options.backing is not UNSET:
        _check_same(opened, Role.BACKING, await _other(opened, Role.BACKING, options.backing))
    if options.data_file is not None:
        _check_same(opened, Role.DATA_FILE, await opened.child(Role.DATA_FILE, options.data_file))
    below = opened.planned(file)
    read_only = common.read_only or (common.auto_read_only and below.read_only)
    if not read_only:
        driver.header.for_writing()
    return driver.reopened(
        read_only=read_only, direct=common.direct, flushes=common.flushes, unmap=common.unmap
    )


async def _other(opened: _Opened, role: Role, reference: str | NodeOptions | None) -> Node | None:
    return None if reference is None else await opened.child(role, reference)


def _check_same(opened: _Opened, role: Role, child: Node | None) -> None:
    if child is not opened.node.driver.children.get(role):
        raise BlockdError(
            f"The '{role.value}' child of node '{opened.node.name}' can't become another node"
        )


async def _reopen_null(opened: _Opened, options: NullOptions) -> Driver:
    driver = await open_null(opened, options)
    if driver.size_bytes != opened.node.size_bytes:
        raise BlockdError("Cannot change the option 'size'")
    return driver


#: What opens a node's storage anew, with all that the options may change.
_REOPENERS: Mapping[type[NodeOptions], Callable[[_Opened, Any], Awaitable[Driver]]] = {
    FileOptions: _reopen_file,
    HostDeviceOptions: _reopen_file,
    RawOptions: open_raw,
    Qcow2Options: _reopen_qcow2,
    NullOptions: _reopen_null,
    ThrottleOptions: open_throttle,
}
