"""Image locks that QEMU understands: OFD locks on single bytes (QEMU's block/file-posix.c).

For each permission that is used a shared lock is held on one byte, and for each permission that
is denied to others a shared lock on another byte. Whoever comes later looks for locks on the
opposite bytes. Locks go with the descriptor, so kill -9 leaves none behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from blockd.errors import BlockdError

_USED_AT = 100
_DENIED_AT = 200
# Bit numbers of QEMU's BLK_PERM_*.
_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3
_NAMES = {_CONSISTENT_READ: "consistent read", _WRITE: "write", _RESIZE: "resize"}
# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def lock_image(fd: int, filename: str, *, read_only: bool, beside_writer: bool = False) -> None:
    """Hold ``fd``'s image: for reading, or for writing with no other writer beside it.

    ``beside_writer``: another descriptor of ours holds it for writing, so nobody is in the way;
    that one may go on to resize it until ``rely_on_size``.

    Raises ``BlockdError`` where another process, or another node, holds it otherwise. A file
    system without such locks is used without them, as QEMU does by default.
    """
    used = [_CONSISTENT_READ] if read_only else [_CONSISTENT_READ, _WRITE]
    denied = [_RESIZE] if read_only else [_WRITE, _RESIZE]
    with _lockable(filename):
        for bit in used:
            _lock(fd, _USED_AT + bit)
        for bit in denied:
            if bit != _RESIZE or not beside_writer:
                _lock(fd, _DENIED_AT + bit)
        if beside_writer:
            return
        for bit in used:
            if _locked(fd, _DENIED_AT + bit):
                raise _conflict(filename, f'"{_NAMES[bit]}" lock')
        for bit in denied:
            if _locked(fd, _USED_AT + bit):
                raise _conflict(filename, f'shared "{_NAMES[bit]}" lock')


def rely_on_size(fd: int, filename: str, *, instead_of: int) -> None:
    """Let nobody else resize the image; another descriptor of ours does so no longer."""
    with _lockable(filename):
        _lock(fd, _DENIED_AT + _RESIZE)
        _lock(instead_of, _DENIED_AT + _RESIZE, fcntl.F_UNLCK)


def hold_to_resize(fd: int, filename: str) -> None:
    """From now on ``fd`` may change the size at any time: nobody else may rely on it.

    Raises ``BlockdError`` where somebody does.
    """
    with _lockable(filename):
        _lock(fd, _USED_AT + _RESIZE)
        if _locked(fd, _DENIED_AT + _RESIZE):
            _lock(fd, _USED_AT + _RESIZE, fcntl.F_UNLCK)
            raise _conflict(filename, '"resize" lock')


def keep_writers_out(fd: int, filename: str, *, beside_writer: bool = False) -> None:
    """Let nobody else write to ``fd``'s image, which is held for reading.

    ``beside_writer``: another descriptor of ours does, and is about to be closed. Raises
    ``BlockdError`` where somebody else does.
    """
    with _lockable(filename):
        _lock(fd, _DENIED_AT + _WRITE)
        if not beside_writer and _locked(fd, _USED_AT + _WRITE):
            let_writers_in(fd)
            raise _conflict(filename, f'shared "{_NAMES[_WRITE]}" lock')


def let_writers_in(fd: int) -> None:
    """End what ``keep_writers_out`` began."""
    with suppress(OSError):
        _lock(fd, _DENIED_AT + _WRITE, fcntl.F_UNLCK)


def end_writing(fd: int) -> None:
    """Hold ``fd``'s image, which was held for writing, for reading; other writers stay out."""
    with suppress(OSError):
        for byte in (_USED_AT + _WRITE, _USED_AT + _RESIZE):
            _lock(fd, byte, fcntl.F_UNLCK)


@contextmanager
def resizing(fd: int, filename: str) -> Iterator[None]:
    """The body changes the size of an image that ``fd`` holds for writing.

    Raises ``BlockdError`` where somebody relies on the size; every node does, also one that only
    reads.
    """
    hold_to_resize(fd, filename)
    try:
        yield
    finally:
        with _lockable(filename):
            _lock(fd, _USED_AT + _RESIZE, fcntl.F_UNLCK)


@contextmanager
def _lockable(filename: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        # A classic lock of a program that knows nothing of QEMU's.
        raise _conflict(filename, "a lock") from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def _lock(fd: int, byte: int, kind: int = fcntl.F_RDLCK) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _locked(fd: int, byte: int) -> bool:
    """Whether another descriptor holds a lock on the byte."""
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _conflict(filename: str, lock: str) -> BlockdError:
    return BlockdError(f"Failed to get {lock}: is another process or node using '{filename}'?")
