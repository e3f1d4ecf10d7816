"""Opening the files and devices behind nodes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from blockd.block.drivers.direct import DirectFileDriver
from blockd.block.drivers.file import FileDriver
from blockd.block.drivers.locking import lock_image
from blockd.errors import BlockdError


def open_file(
    filename: str,
    *,
    driver: str,
    read_only: bool,
    auto_read_only: bool,
    direct: bool,
    unmap: bool,
    flushes: bool,
) -> FileDriver:
    """Open a regular file (``driver`` "file") or a device ("host_device"). Blocks.

    Raises ``BlockdError`` with the path and the reason.
    """
    if not filename:
        raise BlockdError("The 'file' block driver requires a file name")
    fd, read_only = _open(filename, read_only=read_only, auto_read_only=auto_read_only)
    with _closing_on_error(fd, f"Could not open '{filename}'"):
        _check_kind(filename, driver, os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        lock_image(fd, filename, read_only=read_only)
        if direct:
            return DirectFileDriver(
                fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes
            )
        return FileDriver(fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes)


@contextmanager
def _closing_on_error(fd: int, what: str) -> Iterator[None]:
    """A body that fails leaves no descriptor; an ``OSError`` becomes what the user reads."""
    try:
        yield
    except OSError as error:
        os.close(fd)
        raise BlockdError(f"{what}: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise


def _open(filename: str, *, read_only: bool, auto_read_only: bool) -> tuple[int, bool]:
    # A FIFO that nobody writes to would hold up its opening for ever.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if not read_only:
            try:
                return os.open(filename, os.O_RDWR | flags), False
            except OSError as error:
                if not auto_read_only or error.errno not in (errno.EACCES, errno.EROFS):
                    raise
        return os.open(filename, os.O_RDONLY | flags), True
    except OSError as error:
        raise BlockdError(f"Could not open '{filename}': {error.strerror}") from error


def _check_kind(filename: str, driver: str, mode: int) -> None:
    if driver == "file" and not stat.S_ISREG(mode):
        raise BlockdError(f"'file' driver requires '{filename}' to be a regular file")
    if driver == "host_device" and not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
        raise BlockdError(
            f"'host_device' driver requires '{filename}' to be either a character or block device"
        )


class NewFile(NamedTuple):
    """A file that ``create_file`` opened; ``created``: it was not there before."""

    driver: FileDriver
    created: bool


def create_file(filename: str, size_bytes: int) -> NewFile:
    """Open a regular file that is to become ``size_bytes`` of zeroes, or make one. Blocks.

    What is there stays as it is until ``FileDriver.make_empty``, so that a command can still be
    refused; but the image lock is taken. Raises ``BlockdError``.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            fd, created = os.open(filename, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            fd, created = os.open(filename, flags | os.O_CREAT, 0o600), False
    except OSError as error:
        raise BlockdError(f"Could not create '{filename}': {error.strerror}") from error
    with _closing_on_error(fd, f"Could not create '{filename}'"):
        _check_kind(filename, "file", os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        lock_image(fd, filename, read_only=False)
        driver = FileDriver(fd, filename=filename, read_only=False, unmap=True, flushes=True)
    driver.size_bytes = size_bytes
    return NewFile(driver, created)


#: First bytes of images that are no raw ones.
_MAGICS = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"QED\0": "qed",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"LUKS\xba\xbe": "luks",
    b"<<< ": "vdi",
}


def is_block_device(filename: str) -> bool:
    """Whether a block device, or a link to one, has this name. Blocks."""
    try:
        return stat.S_ISBLK(os.stat(filename).st_mode)
    except OSError:
        return False


def guess_format(filename: str) -> str:
    """The format that a file's first bytes suggest; "raw" where they say nothing. Blocks.

    Raises ``BlockdError`` where it can't be read.
    """
    try:
        with open(filename, "rb", opener=_open_at_once) as file:
            start = file.read(max(map(len, _MAGICS)))
    except OSError as error:
        raise BlockdError(f"Could not open '{filename}': {error.strerror}") from error
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), "raw")


def _open_at_once(filename: str, flags: int) -> int:
    return os.open(filename, flags | os.O_NONBLOCK)
