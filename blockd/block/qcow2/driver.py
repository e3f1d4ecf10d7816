"""``qcow2``: an image in a file, over a backing file or not."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from blockd.block.allocation import Allocation
from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Role
from blockd.block.qcow2.allocation import find_allocation
from blockd.block.qcow2.chain import backing_path
from blockd.block.qcow2.entries import CorruptImageError
from blockd.block.qcow2.features import Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.image import Changes, Image
from blockd.errors import WouldBlock

log = logging.getLogger(__name__)


class Qcow2Driver(Driver):
    """One image. ``Image.open`` makes what it works on."""

    name = "qcow2"

    def __init__(self, image: Image, *, direct: bool, flushes: bool, unmap: bool) -> None:
        """``unmap``: discards are followed."""
        self._image = image
        self.size_bytes = image.header.size_bytes
        self.read_only = image.changes is None
        self.cluster_size_bytes = image.header.cluster_size_bytes
        #: The name of the file that the image lies in.
        self.file_name = image.file.node.driver.filename
        self.filename = self._filename()
        self.direct = direct
        self.flushes = flushes
        self._unmap = unmap
        self._broken = False

    def _filename(self) -> str:
        """The file's name, where it tells all of it; or the options as QEMU's "json:" has them."""
        image, header = self._image, self._image.header
        backing = None if image.backing is None else image.backing.driver.filename
        named = header.backing_file
        if backing == (None if named is None else backing_path(self.file_name, named)):
            return self.file_name
        options = {
            "backing": None if image.backing is None else _options(image.backing),
            "driver": self.name,
            "file": _options(image.file.node),
        }
        return f"json:{json.dumps(options)}"

    @property
    def found_dirty(self) -> bool:
        """Whether the image was not closed in order, and is only read, so was not repaired."""
        return self.read_only and bool(self._image.header.incompatible & Incompatible.DIRTY)

    @property
    def header(self) -> Header:
        """The header as it stands in the file."""
        changes = self._image.changes
        return self._image.header if changes is None else changes.metadata.header

    @property
    def children(self) -> Mapping[Role, Node]:
        image = self._image
        children = {Role.FILE: image.file.node}
        if image.data_file is not image.file:
            children[Role.DATA_FILE] = image.data_file.node
        if image.backing is not None:
            children[Role.BACKING] = image.backing
        return children

    # -- reading -----------------------------------------------------------------------------

    def read_nowait(self, offset: int, view: memoryview) -> None:
        self._image.reader.read_nowait(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        with self._image.requests.under_way():
            await self._image.reader.read(offset, view)

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        return await find_allocation(self._image.reader, offset, length)

    async def allocated_bytes(self) -> int:
        image = self._image
        allocated = await image.file.node.driver.allocated_bytes()
        if image.data_file is not image.file:
            allocated += await image.data_file.node.driver.allocated_bytes()
        return allocated

    # -- writing -----------------------------------------------------------------------------

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if self._broken or self._image.changes is None:
            raise WouldBlock
        self._image.changes.writer.write_nowait(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        async with self._changing() as changes:
            await changes.writer.write(offset, view)

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        """Write ``view`` as compressed clusters, where that makes them smaller.

        It begins at a cluster's start, and ends at one's end or the image's. Raises ``OSError``.
        """
        async with self._changing() as changes:
            await changes.packer.write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        async with self._changing() as changes:
            await changes.zeroer.write_zeroes(offset, length, unmap=unmap and self._unmap)

    async def discard(self, offset: int, length: int) -> None:
        if not self._unmap:
            return
        async with self._changing() as changes:
            await changes.zeroer.discard(offset, length)

    async def truncate(self, size_bytes: int) -> None:
        async with self._changing() as changes:
            await changes.resizer.resize(size_bytes)
        self.size_bytes = changes.metadata.size_bytes

    async def flush(self) -> None:
        if self._image.changes is None:
            return
        async with self._changing() as changes:
            await changes.metadata.flush()

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Changes]:
        """The body changes the image. One that is found to be corrupt is changed no more."""
        changes = self._image.changes
        if changes is None or self._broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            with self._image.requests.under_way():
                yield changes
        except CorruptImageError as error:
            log.error("'%s': %s; nothing is written to it any more", self.filename, error.strerror)
            self._broken = True
            await changes.metadata.mark_corrupt()
            raise

    async def close(self) -> None:
        changes = self._image.changes
        if changes is None or self._broken:
            return
        try:
            await changes.metadata.close()
        except OSError as error:
            # The dirty bit stays: whoever opens the image next repairs it.
            log.warning("'%s' could not be closed in order: %s", self.filename, error)


def _options(node: Node) -> dict[str, Any]:
    """The options that would make a node like this one."""
    driver = node.driver
    if driver.filename.startswith("json:"):
        options: dict[str, Any] = json.loads(driver.filename.removeprefix("json:"))
        return options
    file = driver.children.get(Role.FILE)
    if file is not None:
        return {"driver": driver.name, "file": _options(file)}
    return {"driver": driver.name, "filename": driver.filename}
