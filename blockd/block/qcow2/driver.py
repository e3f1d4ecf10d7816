"""``qcow2``: an image in a file, over a backing file or not."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from blockd import limits
from blockd.block.allocation import Allocation
from blockd.block.descriptor import WriteBy
from blockd.block.driver import Corruption, Driver
from blockd.block.node import Node
from blockd.block.permissions import Access, Role, of_backing_file, of_data_file, of_image_file
from blockd.block.qcow2.allocation import find_allocation
from blockd.block.qcow2.bitmaps import Qcow2Bitmaps
from blockd.block.qcow2.chain import backing_path
from blockd.block.qcow2.entries import CorruptImageError
from blockd.block.qcow2.features import Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.image import Changes, Image, open_image, read_header
from blockd.block.qcow2.room import ImageRoom
from blockd.errors import BlockdError, WouldBlock

log = logging.getLogger(__name__)


class Qcow2Driver(Driver):
    """One image. ``Image.open`` makes what it works on."""

    name = "qcow2"
    supports_backing = True

    def __init__(self, image: Image, *, direct: bool, flushes: bool, unmap: bool) -> None:
        """``unmap``: discards are followed."""
        self._image = image
        self.size_bytes = image.header.size_bytes
        self.read_only = image.changes is None
        self.cluster_size_bytes = image.header.cluster_size_bytes
        self.direct = direct
        self.flushes = flushes
        self.ignores_discards = not unmap
        # The clusters of an external data file lie where the guest sees them.
        self.compresses = not image.header.has_data_file
        #: Damage was found and told of: no I/O is possible any more; or some damage was.
        self._broken = self._damaged = False
        self.bitmap_store: Qcow2Bitmaps = Qcow2Bitmaps(self._room())
        self.child_changed()

    def _room(self) -> ImageRoom:
        return ImageRoom(self._image_of_bitmaps, self._changing, self._tell_lost_bitmaps)

    def _image_of_bitmaps(self) -> Image:
        """Their image, which is not written to any more once it was found to be corrupt."""
        return replace(self._image, changes=None) if self._broken else self._image

    def child_changed(self) -> None:
        file = self._image.file.node.driver
        #: The name of the file that the image lies in.
        self.file_name = file.filename
        told = "filename" in file.options and not self._backing_overridden()
        self.filename = file.filename if told else f"json:{json.dumps(self.options)}"

    def _backing_overridden(self) -> bool:
        """Whether the backing file is another one than the image says."""
        backing, named = self._image.reader.backing, self._image.header.backing_file
        if backing is None or named is None:
            return backing is not None or named is not None
        return backing.driver.filename != backing_path(self.file_name, named)

    @property
    def options(self) -> dict[str, Any]:
        # In QEMU's order.
        below = {role: node.driver.options for role, node in self.children.items()}
        options: dict[str, Any] = {}
        if Role.DATA_FILE in below:
            options["data-file"] = below[Role.DATA_FILE]
        if self._backing_overridden():
            options["backing"] = below.get(Role.BACKING)
        return {**options, "driver": self.name, "file": below[Role.FILE]}

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
        if image.reader.backing is not None:
            children[Role.BACKING] = image.reader.backing
        return children

    @property
    def path(self) -> str | None:
        return self._image.file.node.path

    def child_access(self, role: Role, access: Access) -> Access:
        if role is Role.BACKING:
            return of_backing_file(access)
        if role is Role.DATA_FILE:
            return of_data_file(access)
        return of_image_file(access, writable=not self.read_only)

    def replace_child(self, role: Role, node: Node | None) -> None:
        image = self._image
        if role is Role.BACKING:
            image.reader.backing = node
            return
        assert node is not None
        (image.file if role is Role.FILE else image.data_file).node = node

    # -- reading -----------------------------------------------------------------------------

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if self._broken:
            raise WouldBlock
        try:
            self._image.reader.read_nowait(offset, view)
        except CorruptImageError:
            # It is met again the other way, and dealt with there.
            raise WouldBlock from None

    async def read(self, offset: int, view: memoryview) -> None:
        async with self._looking() as image:
            await image.reader.read(offset, view)

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        async with self._looking() as image:
            return await find_allocation(image.reader, offset, length)

    async def allocated_bytes(self) -> int:
        image = self._image
        allocated = await image.file.node.allocated_bytes()
        if image.data_file is not image.file:
            allocated += await image.data_file.node.allocated_bytes()
        return allocated

    # -- writing -----------------------------------------------------------------------------

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if self._broken or self._image.changes is None:
            raise WouldBlock
        try:
            self._image.changes.writer.write_nowait(offset, view)
        except CorruptImageError:
            raise WouldBlock from None

    async def write(self, offset: int, view: memoryview) -> None:
        async with self._changing() as changes:
            await changes.writer.write(offset, view)

    @property
    def takes_write_by(self) -> bool:
        image = self._image
        return image.changes is not None and image.data_file.node.takes_write_by

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        async with self._changing() as changes:
            return await changes.bulk.write_by(offset, length, call)

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        """Write ``view`` as compressed clusters, where that makes them smaller.

        It begins at a cluster's start, and ends at one's end or the image's. Raises ``OSError``.
        """
        async with self._changing() as changes:
            await changes.packer.write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        async with self._changing() as changes:
            await changes.zeroer.write_zeroes(
                offset, length, unmap=unmap and not self.ignores_discards
            )

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        changes = self._image.changes
        return changes is not None and changes.zeroer.is_fast(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if self.ignores_discards:
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
        self._image.file.debug_event("flush_to_os")
        async with self._changing() as changes:
            await changes.metadata.flush()

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Changes]:
        """As ``_looking``, where the body changes the image."""
        async with self._looking() as image:
            if image.changes is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield image.changes

    # -- damage ------------------------------------------------------------------------------

    def _tell_lost_bitmaps(self, reason: str) -> None:
        """Only they are damaged, as far as anybody knows."""
        message = f"The bitmaps in the image are damaged, and lost, so do a full backup: {reason}"
        log.error("'%s': %s", self.filename, message)
        if self.on_corruption is not None:
            self.on_corruption(Corruption(message, fatal=False))

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[Image]:
        """The body uses the image. One that is found to be corrupt is used no more."""
        image = self._image
        if self._broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            with image.requests.under_way():
                yield image
        except CorruptImageError as error:
            await self._deal_with(error)
            raise

    async def _deal_with(self, error: CorruptImageError) -> None:
        """Tell of it: once, and once more where the image may be used no more."""
        changes = self._image.changes
        fatal = error.fatal and changes is not None
        if self._broken or (self._damaged and not fatal):
            return
        self._damaged, self._broken = True, fatal
        log.error("'%s': %s", self.filename, error.strerror)
        if self.on_corruption is not None:
            self.on_corruption(Corruption(error.reason, fatal))
        if fatal:
            assert changes is not None
            with trio.move_on_after(limits.QCOW2_MARK_CORRUPT_SECONDS, shield=True):
                await self._mark_corrupt(changes)

    async def _mark_corrupt(self, changes: Changes) -> None:
        try:
            await changes.metadata.mark_corrupt()
        except OSError as error:
            log.error("'%s' could not be marked as corrupt: %s", self.filename, error.strerror)

    async def suspend(self) -> None:
        changes = self._image.changes
        if changes is not None and not self._broken:
            try:
                await changes.metadata.close()
            except CorruptImageError as error:
                await self._deal_with(error)
                raise
        self._image = replace(self._image, header=self.header, changes=None)

    async def resume(self) -> None:
        image = self._image
        if image.changes is not None or self._broken:
            return
        header = await read_header(image.file.node)
        if header.size_bytes != self.size_bytes:
            raise BlockdError(f"'{self.filename}' has been changed by somebody else meanwhile")
        self._image = await open_image(
            image.file.node,
            header,
            backing=image.reader.backing,
            data_file=None if image.data_file is image.file else image.data_file.node,
            discard_freed=not self.ignores_discards,
        )
        await self.bitmap_store.find_again()

    async def make_read_only(self) -> None:
        await self.suspend()
        self.read_only = True
        self.keep_writers_out(beside_writer=True)

    def reopened(self, *, read_only: bool, direct: bool, flushes: bool, unmap: bool) -> Qcow2Driver:
        """Another one over the same image, which is to take over."""
        image = replace(self._image, header=self.header, changes=None)
        driver = Qcow2Driver(image, direct=direct, flushes=flushes, unmap=unmap)
        driver.size_bytes, driver.read_only = self.size_bytes, read_only
        return driver

    @property
    def given_over(self) -> tuple[Image, bool, bool]:
        """The image as it was left, whether damage was found in it, and whether that was fatal."""
        return self._image, self._damaged, self._broken

    def take_over(self, before: Driver) -> None:
        if isinstance(before, Qcow2Driver):
            self._image, self._damaged, self._broken = before.given_over
            self.bitmap_store = before.bitmap_store
            self.bitmap_store.room = self._room()
        if self.read_only:
            self.keep_writers_out(beside_writer=True)

    async def close(self) -> None:
        try:
            await self.suspend()
        except OSError as error:
            # The dirty bit stays: whoever opens the image next repairs it.
            log.warning("'%s' could not be closed in order: %s", self.filename, error)
        finally:
            self._image = replace(self._image, changes=None)
