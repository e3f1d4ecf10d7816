"""System calls that Python's ``os`` module lacks. They block, and let other threads run."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from enum import IntFlag

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_sync_file_range.restype = ctypes.c_int
# linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2


class Mode(IntFlag):
    """``linux/falloc.h``."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


def fallocate(fd: int, mode: Mode, offset: int, length: int) -> None:
    """Change the allocation of a range. Raises ``OSError``."""
    _call(_fallocate, fd, mode, offset, length)


def sync_file_range_write(fd: int, offset: int, length: int) -> None:
    """Start the writeback of a range's dirty pages. Raises ``OSError``."""
    _call(_sync_file_range, fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def _call(function: Callable[..., int], *arguments: int) -> None:
    """Call again after a signal, as Python's own system calls do (PEP 475)."""
    while function(*arguments) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
