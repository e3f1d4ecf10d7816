"""The overlay of a blockdev-snapshot-sync: a file that is opened, or an image made in one."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from blockd.block import FileDriver, Graph, NewFile, Node, create_file, is_block_device
from blockd.block.qcow2 import (
    ImageOptions,
    Qcow2Driver,
    create_image,
    name_backing,
    open_image,
    plan_image,
    read_header,
)
from blockd.errors import BlockdError
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import Common, open_node
from blockd.qmp.types.blockdev import (
    BlockdevOptions,
    FileOptions,
    HostDeviceOptions,
    Qcow2Options,
    RawOptions,
)
from blockd.qmp.types.snapshot import BlockdevSnapshotSync

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+):")
#: Formats that an image without a backing file may have.
_FLAT = ("raw", "file", "host_device")


@dataclass(frozen=True, slots=True)
class OverlayFile:
    """A node that commands don't find yet. ``keep`` it, or ``remove`` it: then all is as it was."""

    node: Node
    keep: Callable[[], Awaitable[None]]
    remove: Callable[[], Awaitable[None]]


async def open_overlay(graph: Graph, arguments: BlockdevSnapshotSync, below: Node) -> OverlayFile:
    """Open the overlay for ``below``, and make it where it is to be made.

    Raises ``BlockdError``, and then nothing has changed.
    """
    name = arguments.snapshot_file.removeprefix("file:")
    if arguments.snapshot_node_name is not None:
        graph.check_name(arguments.snapshot_node_name)
    if arguments.mode == "existing":
        node = await _open(graph, arguments, name, below)
        return OverlayFile(node, trio.lowlevel.checkpoint, lambda: graph.remove(node))
    made = _NewImage(graph, name, _image_options(arguments, name, below))
    await made.make()
    try:
        node = await _open(graph, arguments, name, below)
    except BaseException:
        with trio.CancelScope(shield=True):
            await made.undo()
        raise

    async def remove() -> None:
        await graph.remove(node)
        await made.undo()

    return OverlayFile(node, made.keep, remove)


async def rehearse_overlay(
    graph: Graph, arguments: BlockdevSnapshotSync, below: Node
) -> OverlayFile:
    """As ``open_overlay``, but an image in memory stands in, so that no file is made or changed.

    What only the file can say is not found out.
    """
    name = arguments.snapshot_file.removeprefix("file:")
    if arguments.snapshot_node_name is not None:
        graph.check_name(arguments.snapshot_node_name)
    options = ImageOptions(below.size_bytes)
    if arguments.mode == "absolute-paths":
        plan_image(_image_options(arguments, name, below))
    elif not isinstance(_options(arguments.format, FileOptions(filename=name), None), Qcow2Options):
        raise BlockdError("The overlay does not support backing images")
    driver = FileDriver(
        os.memfd_create("rehearsal"), filename=name, read_only=False, unmap=True, flushes=True
    )
    file = graph.add(None, driver, owned=False, hidden=True)
    try:
        await create_image(file, options)
        image = await open_image(file, await read_header(file), read_only=below.read_only)
        overlay = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
        node = graph.add(arguments.snapshot_node_name, overlay, owned=False, hidden=True)
    except BaseException:
        with trio.CancelScope(shield=True):
            await graph.remove(file)
        raise
    return OverlayFile(node, trio.lowlevel.checkpoint, lambda: graph.remove(node))


async def _open(graph: Graph, arguments: BlockdevSnapshotSync, name: str, below: Node) -> Node:
    """It is opened as ``below`` is."""
    driver = below.driver
    common = Common(
        read_only=below.read_only,
        auto_read_only=False,
        direct=driver.direct,
        flushes=driver.flushes,
        unmap=not driver.ignores_discards,
    )
    is_device = await trio.to_thread.run_sync(is_block_device, name)
    file = (HostDeviceOptions if is_device else FileOptions)(filename=name)
    options = _options(arguments.format, file, arguments.snapshot_node_name)
    made_before = arguments.mode == "existing"
    node = await open_node(OPENERS, graph, options, common, owned=False, top=made_before)
    graph.hide(node)
    return node


def _options(
    kind: str, file: FileOptions | HostDeviceOptions, node_name: str | None
) -> BlockdevOptions:
    if kind == "qcow2":
        return Qcow2Options(node_name=node_name, file=file, backing=None)
    if kind == "raw":
        return RawOptions(node_name=node_name, file=file)
    raise BlockdError(f"Unknown driver '{kind}'")


def _image_options(arguments: BlockdevSnapshotSync, name: str, below: Node) -> ImageOptions:
    """What the overlay is to be. Raises ``BlockdError``; QEMU's order."""
    kind = arguments.format
    if kind not in ("qcow2", *_FLAT):
        raise BlockdError(f"Unknown file format '{kind}'")
    protocol = _PROTOCOL.match(name)
    if protocol is not None:
        raise BlockdError(f"Unknown protocol '{protocol[1]}'")
    if kind in _FLAT:
        raise BlockdError(f"Backing file not supported for file format '{kind}'")
    if name == below.driver.filename:
        raise BlockdError(
            "Error: Trying to create an image with the same filename as the backing file"
        )
    return ImageOptions(
        below.size_bytes,
        backing_file=name_backing(name, below.driver.filename),
        backing_format=below.driver.name,
    )


class _NewImage:
    """An image made in a file. What was in that is kept beside it until ``keep`` or ``undo``."""

    def __init__(self, graph: Graph, filename: str, options: ImageOptions) -> None:
        self._graph = graph
        self._filename = filename
        self._options = options
        self._path = os.path.realpath(filename)
        self._aside: str | None = None
        self._file: NewFile | None = None
        self._begun = False

    async def make(self) -> None:
        """Raises ``BlockdError``, and then all is as it was."""
        plan_image(self._options)
        try:
            driver = await trio.to_thread.run_sync(self._open)
            self._begun = True
            try:
                await create_image(Node("", driver), self._options)
            finally:
                with trio.CancelScope(shield=True):
                    await driver.close()
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.undo()
            if isinstance(error, OSError):
                raise BlockdError(
                    f"Could not create '{self._filename}': {error.strerror}"
                ) from error
            raise

    def _open(self) -> FileDriver:
        """Open the file, empty. Blocks."""
        self._file = create_file(self._filename, 0)
        fd = self._file.driver.fd
        before = os.fstat(fd)
        try:
            self._graph.check_storage(self._file.driver)
        except BlockdError:
            os.close(fd)
            raise
        if before.st_size:
            os.close(fd)
            self._set_aside()
            self._file = create_file(self._filename, 0)
            fd = self._file.driver.fd
            with suppress(OSError):
                os.fchmod(fd, stat.S_IMODE(before.st_mode))
                os.fchown(fd, before.st_uid, before.st_gid)
        return self._file.driver

    def _set_aside(self) -> None:
        """Give a file with content another name."""
        directory, name = os.path.split(self._path)
        fd, self._aside = tempfile.mkstemp(dir=directory, prefix=f"{name}.")
        os.close(fd)
        os.rename(self._path, self._aside)

    async def undo(self) -> None:
        """Put back what was there."""
        await trio.to_thread.run_sync(self._undo)

    def _undo(self) -> None:
        if self._aside is not None:
            os.rename(self._aside, self._path)
        elif self._file is not None and self._file.made is not None:
            self._file.remove()
        elif self._file is not None and self._begun:
            # It was empty before.
            os.truncate(self._path, 0)

    async def keep(self) -> None:
        """Let the image take the place of what was there."""
        if self._aside is not None:
            await trio.to_thread.run_sync(os.unlink, self._aside)
