"""An image that is yet to be made: until then, its file stays as it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

from blockd.block.allocation import Allocation
from blockd.block.driver import Driver
from blockd.block.node import Node
from blockd.block.permissions import Access, Role, of_backing_file, of_image_file
from blockd.block.qcow2.create import create_image
from blockd.block.qcow2.driver import Qcow2Driver
from blockd.block.qcow2.image import open_image, read_header
from blockd.block.qcow2.image_options import ImageOptions
from blockd.block.qcow2.layout import plan_image
from blockd.errors import BlockdError


class NewImage(Driver):
    """Stands for what ``options`` describe, in ``file``; every I/O fails.

    ``make`` gives the driver that takes its place.
    """

    name = "qcow2"
    read_only = False
    supports_backing = True
    compresses = True

    def __init__(self, file: Node, options: ImageOptions, *, backing: Node | None = None) -> None:
        """``backing``: the node that ``options.backing_file`` is the name of.

        Raises ``BlockdError`` where no image can be like that.
        """
        plan_image(options).header.build()
        self._file = file
        self._options = options
        self._backing = backing
        self.size_bytes = options.size_bytes
        self.cluster_size_bytes = options.cluster_size_bytes
        self.filename = file.driver.filename

    @property
    def children(self) -> Mapping[Role, Node]:
        children = {Role.FILE: self._file, Role.BACKING: self._backing}
        return {role: child for role, child in children.items() if child is not None}

    def child_access(self, role: Role, access: Access) -> Access:
        if role is Role.BACKING:
            return of_backing_file(access)
        return of_image_file(access, writable=True)

    def replace_child(self, role: Role, node: Node | None) -> None:
        if role is Role.BACKING:
            self._backing = node
            return
        assert node is not None
        self._file = node

    @property
    def path(self) -> str | None:
        return self._file.path

    async def make(self, empty: Callable[[], Awaitable[None]]) -> Qcow2Driver:
        """Make the image; ``empty`` drops what is in the file. Raises ``OSError``."""
        try:
            await empty()
            await create_image(self._file, self._options)
            header = await read_header(self._file)
            image = await open_image(self._file, header, backing=self._backing)
        except BlockdError as error:
            # The options were checked before, so it is the file.
            raise OSError(errno.EIO, error.message) from error
        return Qcow2Driver(image, direct=False, flushes=True, unmap=True)

    async def read(self, offset: int, view: memoryview) -> None:
        raise _not_there()

    async def write(self, offset: int, view: memoryview) -> None:
        raise _not_there()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        raise _not_there()

    async def discard(self, offset: int, length: int) -> None:
        raise _not_there()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        raise _not_there()

    async def allocated_bytes(self) -> int:
        return await self._file.allocated_bytes()

    async def flush(self) -> None:
        """Nothing was written."""

    async def close(self) -> None:
        """The children are nodes of their own and are closed as such."""


def _not_there() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))
