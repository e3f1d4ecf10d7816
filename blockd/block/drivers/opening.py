"""Opening the files and devices behind nodes."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from blockd.block.drivers.direct import DirectFileDriver
from blockd.block.drivers.file import FileDriver
from blockd.block.drivers.locking import lock_image
from blockd.errors import BlockdError

_log = logging.getLogger(__name__)


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
    fd, read_only = _open(filename, filename, read_only=read_only, auto_read_only=auto_read_only)
    with _closing_on_error(fd, f"Could not open '{filename}'"):
        _check_kind(filename, driver, os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        lock_image(fd, filename, read_only=read_only)
        if direct:
            return DirectFileDriver(
                fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes
            )
        return FileDriver(fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes)


def reopen_file(
    driver: FileDriver,
    *,
    read_only: bool,
    auto_read_only: bool,
    direct: bool,
    unmap: bool,
    flushes: bool,
) -> FileDriver:
    """Open the file of ``driver`` once more, whatever its name means now. Blocks.

    It is held by both until one of them is closed. Raises ``BlockdError``.
    """
    filename = driver.filename
    fd, read_only = _open(
        f"/proc/self/fd/{driver.fd}", filename, read_only=read_only, auto_read_only=auto_read_only
    )
    with _closing_on_error(fd, f"Could not open '{filename}'"):
        os.set_blocking(fd, True)
        with driver.letting_writer_in():
            lock_image(fd, filename, read_only=read_only, beside_writer=not driver.read_only)
        kind = DirectFileDriver if direct else FileDriver
        reopened = kind(fd, filename=filename, read_only=read_only, unmap=unmap, flushes=flushes)
    # It may have grown meanwhile, but its users go by this.
    reopened.size_bytes = driver.size_bytes
    return reopened


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


def _open(path: str, filename: str, *, read_only: bool, auto_read_only: bool) -> tuple[int, bool]:
    """Open ``path``, which errors call ``filename``; whether it could be read only."""
    # A FIFO that nobody writes to would hold up its opening for ever.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if not read_only:
            try:
                return os.open(path, os.O_RDWR | flags), False
            except OSError as error:
                if not auto_read_only or error.errno not in (errno.EACCES, errno.EROFS):
                    raise
        return os.open(path, os.O_RDONLY | flags), True
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
    """A file opened as a target. ``made``: its path, where it was not there before."""

    driver: FileDriver
    made: str | None

    def remove(self) -> None:
        """Delete the file again, where it was made and the path still leads to it. Blocks."""
        if self.made is None:
            return
        try:
            status = os.lstat(self.made)
            if (status.st_dev, status.st_ino) == self.driver.identity:
                os.unlink(self.made)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("'%s' is empty and could not be deleted: %s", self.made, error.strerror)


def create_file(filename: str, size_bytes: int) -> NewFile:
    """Open a regular file that is to become ``size_bytes`` of zeroes, or make one. Blocks.

    What is there stays as it is until ``FileDriver.make_empty``, so that a command can still be
    refused; but the image lock is taken. Raises ``BlockdError``.
    """
    try:
        fd, made = _open_or_make(filename)
    except OSError as error:
        raise BlockdError(f"Could not create '{filename}': {error.strerror}") from error
    return NewFile(_new_driver(fd, filename, size_bytes), made)


def rehearse_file(filename: str, size_bytes: int) -> NewFile:
    """As ``create_file``, but where nothing is there, a file without a name stands in. Blocks.

    It is in memory, so what only the storage can say is not found out.
    """
    try:
        try:
            fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            _check_makeable(filename)
            fd = os.memfd_create("rehearsal")
    except OSError as error:
        raise BlockdError(f"Could not create '{filename}': {error.strerror}") from error
    return NewFile(_new_driver(fd, filename, size_bytes), made=None)


def _check_makeable(filename: str) -> None:
    """Raise the ``OSError`` with which a new file there would be refused, where that is known."""
    directory = os.path.dirname(filename)
    if not filename or not stat.S_ISDIR(os.stat(directory or ".").st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if not os.access(directory or ".", os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _new_driver(fd: int, filename: str, size_bytes: int) -> FileDriver:
    with _closing_on_error(fd, f"Could not create '{filename}'"):
        _check_kind(filename, "file", os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        lock_image(fd, filename, read_only=False)
        driver = FileDriver(fd, filename=filename, read_only=False, unmap=True, flushes=True)
    driver.size_bytes = size_bytes
    return driver


def _open_or_make(filename: str) -> tuple[int, str | None]:
    """A descriptor, and the path of the file where it had to be made."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    with suppress(FileNotFoundError):
        return os.open(filename, flags), None
    # O_EXCL follows no link, also not one that leads to where the file is to be.
    path = os.path.realpath(filename)
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), path
    except FileExistsError:
        return os.open(filename, flags), None


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
