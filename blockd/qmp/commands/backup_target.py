"""The target of a drive-backup: a file that is opened or made for it, and closed after it."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from blockd.block import (
    Driver,
    FileDriver,
    Filter,
    Graph,
    NewFile,
    Node,
    RawDriver,
    create_file,
    guess_format,
    is_block_device,
    open_file,
    rehearse_file,
)
from blockd.block.qcow2 import ImageOptions, NewImage, name_backing, read_header
from blockd.errors import BlockdError
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import open_node
from blockd.qmp.types.backup import DriveBackup
from blockd.qmp.types.blockdev import FileOptions, HostDeviceOptions, Qcow2Options

_Made = TypeVar("_Made", bound=Driver)

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+):")


@dataclass(frozen=True, slots=True)
class Target:
    """A backup's target: ``empty`` drops what is there, ``release`` lets go of it."""

    node: Node
    empty: Callable[[], Awaitable[None]] | None = None
    release: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint


def backing_of(node: Node) -> Node | None:
    """The backing file of the image that ``node`` is, or that the filters there stand on."""
    while isinstance(node.driver, Filter):
        node = node.driver.child
    return node.backing


class TargetFiles:
    """Opens targets; what is there stays as it is until ``Target.empty``."""

    def __init__(self, graph: Graph, *, rehearsing: bool) -> None:
        """``rehearsing``: where nothing is there, nothing comes to be."""
        self._graph = graph
        self._rehearsing = rehearsing

    async def open(self, arguments: DriveBackup, source: Node) -> Target:
        """The target for a backup of ``source``. Raises ``BlockdError``."""
        name = arguments.target.removeprefix("file:")
        protocol = _PROTOCOL.match(name)
        if protocol is not None:
            raise BlockdError(f"Unknown protocol '{protocol[1]}'")
        if arguments.mode == "existing":
            return await self._open_existing(arguments, name, source)
        own = "qcow2" if source.driver.name == "qcow2" else "raw"
        match own if arguments.format is None else arguments.format:
            case "qcow2":
                return await self._new_image(arguments, name, source)
            case "raw" | "file" as kind:
                if arguments.sync in ("top", "none"):
                    raise BlockdError(f"Backing file not supported for file format '{kind}'")
                return await self._new_raw(name, source)
            case kind:
                raise BlockdError(f"Unknown file format '{kind}'")

    # -- made for the backup -----------------------------------------------------------------

    async def _new_raw(self, name: str, source: Node) -> Target:
        file, below = await self._new_file(name, source.size_bytes)
        node, _ = await self._cover(below, RawDriver, file)
        return self._target_of(file, node, file.driver.make_empty)

    async def _new_image(self, arguments: DriveBackup, name: str, source: Node) -> Target:
        """Its backing file has what the backup leaves out: the source, or what is below that."""
        backing = {"top": backing_of(source), "none": source}.get(arguments.sync)
        options = ImageOptions(source.size_bytes)
        if backing is not None:
            options = ImageOptions(
                source.size_bytes,
                backing_file=name_backing(name, backing.driver.filename),
                backing_format=backing.driver.name,
            )
        file, below = await self._new_file(name, 0)
        node, image = await self._cover(
            below, partial(NewImage, options=options, backing=backing), file
        )

        async def make() -> None:
            made = await image.make(file.driver.make_empty)
            async with node.at_rest():
                node.change_driver(made)

        return self._target_of(file, node, make)

    async def _new_file(self, name: str, size_bytes: int) -> tuple[NewFile, Node]:
        make = rehearse_file if self._rehearsing else create_file
        file = await trio.to_thread.run_sync(make, name, size_bytes)
        try:
            self._graph.check_storage(file.driver)
            return file, self._graph.add(None, file.driver, owned=False, hidden=True)
        except BaseException:
            with trio.CancelScope(shield=True):
                await file.driver.close()
                await trio.to_thread.run_sync(file.remove)
            raise

    def _target_of(self, file: NewFile, node: Node, empty: Callable[[], Awaitable[None]]) -> Target:
        used = False

        async def use() -> None:
            nonlocal used
            used = True
            await empty()

        async def release() -> None:
            """A refused command leaves nothing behind."""
            if used:
                await self._graph.remove(node)
            else:
                await self._remove(node, file)

        return Target(node, use, release)

    async def _cover(
        self, below: Node, make_driver: Callable[[Node], _Made], file: NewFile | None = None
    ) -> tuple[Node, _Made]:
        """A node over ``below``, which does not stay without it."""
        try:
            driver = make_driver(below)
            return self._graph.add(None, driver, owned=False, hidden=True), driver
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(below, file)
            raise

    async def _remove(self, node: Node, file: NewFile | None) -> None:
        try:
            await self._graph.remove(node)
        finally:
            if file is not None:
                await trio.to_thread.run_sync(file.remove)

    # -- there before ------------------------------------------------------------------------

    async def _open_existing(self, arguments: DriveBackup, name: str, source: Node) -> Target:
        kind = arguments.format
        if kind is None:
            kind = await trio.to_thread.run_sync(guess_format, name)
            if kind not in ("raw", "qcow2"):
                raise BlockdError(
                    f"Image format was not specified for '{name}', which looks like {kind}: "
                    "give format 'raw' if it is to be overwritten"
                )
        if kind == "qcow2":
            return await self._open_image(arguments, name, source)
        if kind not in ("raw", "file"):
            raise BlockdError(f"Unknown driver '{kind}'")
        target = await self._open_raw(name)
        if arguments.sync == "none":
            await target.release()
            raise BlockdError(
                f"Driver '{kind}' of node '{target.node.name}' does not support backing files"
            )
        return target

    async def _open_raw(self, name: str) -> Target:
        driver = await trio.to_thread.run_sync(_open_file, name)
        try:
            self._graph.check_storage(driver)
            below = self._graph.add(None, driver, owned=False, hidden=True)
        except BaseException:
            with trio.CancelScope(shield=True):
                await driver.close()
            raise
        node, _ = await self._cover(below, RawDriver)
        return Target(node, release=partial(self._graph.remove, node))

    async def _open_image(self, arguments: DriveBackup, name: str, source: Node) -> Target:
        if self._rehearsing:
            return await self._stand_in(name)
        is_device = await trio.to_thread.run_sync(is_block_device, name)
        file = (HostDeviceOptions if is_device else FileOptions)(filename=name)
        options = Qcow2Options(file=file, discard="unmap")
        if arguments.sync == "none":
            options = Qcow2Options(file=file, discard="unmap", backing=source.name)
        node = await open_node(OPENERS, self._graph, options, owned=False, hidden=True)
        return Target(node, release=partial(self._graph.remove, node))

    async def _stand_in(self, name: str) -> Target:
        """An image in memory for the one at ``name``, which opening may change."""
        driver = await trio.to_thread.run_sync(partial(_open_file, name, read_only=True))
        try:
            header = await read_header(Node("", driver))
        except OSError as error:
            raise BlockdError(f"Could not open '{name}': {error.strerror}") from error
        finally:
            with trio.CancelScope(shield=True):
                await driver.close()
        memory = FileDriver(
            os.memfd_create("rehearsal"), filename=name, read_only=False, unmap=True, flushes=True
        )
        below = self._graph.add(None, memory, owned=False, hidden=True)
        options = ImageOptions(header.size_bytes, cluster_size_bytes=header.cluster_size_bytes)
        node, _ = await self._cover(below, partial(NewImage, options=options))
        return Target(node, release=partial(self._graph.remove, node))


def _open_file(name: str, *, read_only: bool = False) -> FileDriver:
    """Blocks."""
    return open_file(
        name,
        driver="host_device" if is_block_device(name) else "file",
        read_only=read_only,
        auto_read_only=False,
        direct=False,
        unmap=True,
        flushes=True,
    )
