"""How an image is found again: where a node's data ends up, and what the host says of that."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockd.block import FileDriver, Node, RawDriver, Role
from blockd.errors import BlockdError
from blockd.state.records import Identity

#: Where the kernel has a device's own name, the best first. A loop device's is that of its file.
_SERIALS = ("dm/uuid", "wwid", "device/wwid", "device/serial", "serial", "loop/backing_file")


@dataclass(frozen=True, slots=True)
class Place:
    """A file or device by ``fd``, and the formats in which a node reads it.

    Two nodes see the same bytes where ``shape`` and ``path`` are the same.
    """

    shape: str
    path: str
    fd: int

    @property
    def key(self) -> str:
        return f"{self.shape}:{self.path}"


def shape_of(key: str) -> str:
    """The shape within a place's key; paths are absolute."""
    return key.partition(":/")[0]


def find_place(node: Node) -> Place:
    """Where the node's data is. Raises ``BlockdError`` where it could not be recognised again."""
    shape = []
    driver = node.driver
    while not isinstance(driver, FileDriver):
        if isinstance(driver, RawDriver) and driver.size_bytes != driver.child.size_bytes:
            shape.append(f"{driver.name}@{driver.offset_bytes}+{driver.size_bytes}")
        else:
            shape.append(driver.name)
        below = driver.children.get(Role.FILE)
        if below is None:
            raise BlockdError(
                f"Node '{node.name}' has no image that could be recognised again: a bitmap is "
                "kept on files and host devices only, so add it without 'persistent'"
            )
        driver = below.driver
    # A link may lead to a name that is not UTF-8, which no record takes.
    path = os.fsencode(os.path.realpath(driver.filename)).decode(errors="backslashreplace")
    return Place(":".join([*shape, driver.name]), path, driver.fd)


def identify(fd: int) -> Identity:
    """What the host says now of the file or device. Blocks. Raises ``OSError``."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return Identity(
            status.st_dev,
            status.st_ino,
            size_bytes=status.st_size,
            changed_ns=status.st_mtime_ns,
            inode_changed_ns=status.st_ctime_ns,
        )
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    return Identity(-1, status.st_rdev, serial=_serial(status.st_rdev), size_bytes=size_bytes)


def sync_and_identify(fd: int) -> Identity:
    """As ``identify``; the times, too, are what they will be after a power cut."""
    os.fsync(fd)
    return identify(fd)


def _serial(number: int) -> str:
    """The device's own name, which stays over boots and moves; empty where it has none."""
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for path in (device, device / ".."):
        for name in _SERIALS:
            with suppress(OSError):
                if serial := (path / name).read_text().strip():
                    return serial + _partition(device)
    return ""


def _partition(device: Path) -> str:
    with suppress(OSError):
        return "/" + (device / "partition").read_text().strip()
    return ""
