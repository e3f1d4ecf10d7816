"""System calls on a descriptor that may wait for the disk: only for worker threads."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

from blockd import limits
from blockd.block.allocation import Allocation
from blockd.block.drivers.syscalls import Mode, fallocate, sync_file_range_write
from blockd.extent import Extent

# linux/fs.h
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277

_INT = struct.Struct("i")


def read(fd: int, offset: int, view: memoryview, *, block_bytes: int = 1) -> None:
    """Fill ``view``; what lies beyond the file's end reads as zeroes. Raises ``OSError``.

    ``block_bytes``: what O_DIRECT reads in. Part of one comes only at the file's end, and to ask
    for the rest is an error on some file systems.
    """
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        done += count
        if count == 0 or done % block_bytes:
            view[done:] = bytes(len(view) - done)
            return


def write(fd: int, offset: int, view: memoryview) -> None:
    """Write all of ``view``. Raises ``OSError``."""
    done = 0
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


def sync(fd: int) -> None:
    """Bring all that was written to stable storage. Raises ``OSError``."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        # "A special file which does not support synchronization", such as /dev/null: fsync(2).
        if error.errno != errno.EINVAL:
            raise


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Begin to write the range's dirty pages to the disk; only a hint, so errors don't count."""
    with suppress(OSError):
        sync_file_range_write(fd, offset, length)


def zero_range(fd: int, offset: int, length: int, *, punch: bool) -> bool:
    """Make the range read as zeroes, without allocating it where ``punch``. Raises ``OSError``.

    False: this storage, or this range on it, takes only zeroes that are written.
    """
    modes = [Mode.ZERO_RANGE]
    if punch:
        modes.insert(0, Mode.PUNCH_HOLE | Mode.KEEP_SIZE)
    for mode in modes:
        try:
            fallocate(fd, mode, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return True
    return False


def discard_file(fd: int, offset: int, length: int) -> None:
    """Give the range's blocks back to the file system; one that can't is left as it is."""
    try:
        fallocate(fd, Mode.PUNCH_HOLE | Mode.KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell a block device that the range is unused; one that can't is left as it is.

    It takes whole sectors only, so the ends of the range may stay.
    """
    try:
        (sector_bytes,) = _INT.unpack(fcntl.ioctl(fd, BLKSSZGET, bytes(_INT.size)))
        start = -(-offset // sector_bytes) * sector_bytes
        end = (offset + length) // sector_bytes * sector_bytes
        if start < end:
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", start, end - start))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise


def allocation(fd: int, offset: int, length: int) -> list[Allocation]:
    """Data and holes from ``offset`` on by SEEK_DATA; a device without holes is all data.

    At most ``limits.ALLOCATION_RUNS_LIMIT`` runs. What lies beyond the file's end is a hole.
    """
    runs: list[Allocation] = []
    end = offset + length
    while offset < end and len(runs) < limits.ALLOCATION_RUNS_LIMIT:
        zero, stop = _run(fd, offset)
        stop = end if stop is None else min(stop, end)
        runs.append(Allocation(Extent(offset, stop - offset), zero))
        offset = stop
    return runs


def _run(fd: int, offset: int) -> tuple[bool, int | None]:
    """Whether ``offset`` lies in a hole, and where that ends (None: not before the file's end)."""
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
        if data > offset:
            return True, data
        hole = os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        # ENXIO: the file ends before. Any other: this storage knows no holes.
        return error.errno == errno.ENXIO, None
    # A hole punched meanwhile: say "data", which is read and so never wrong.
    return False, hole if hole > offset else None
