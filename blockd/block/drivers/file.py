"""``file`` and ``host_device``: a regular file or a block device, by its descriptor.

Buffered I/O is first tried inline, because that costs 2 µs against 75 to 285 µs for a hop to a
worker thread; what can't finish at once goes to a thread. ``direct.py`` has O_DIRECT.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from blockd import limits
from blockd.block.accounting import Counts
from blockd.block.allocation import Allocation
from blockd.block.descriptor import Descriptor, WriteBy
from blockd.block.driver import Driver
from blockd.block.drivers import blocking
from blockd.block.drivers.locking import (
    end_writing,
    hold_to_resize,
    keep_writers_out,
    let_writers_in,
    rely_on_size,
    resizing,
)
from blockd.block.drivers.mounts import is_local
from blockd.errors import BlockdError, WouldBlock

_Result = TypeVar("_Result")

#: What a size is rounded up to; the tail beyond a file's end reads as zeroes, as in QEMU.
SECTOR_BYTES = 512
_ZEROES = memoryview(bytes(limits.MIB))


@dataclass(slots=True, eq=False)
class _Write:
    """A write on its way through a thread."""

    offset: int
    view: memoryview
    ended: bool = False
    error: Exception | None = None


class FileDriver(Driver):
    """Buffered I/O on one descriptor, which the driver owns from now on."""

    discards: Counts

    def __init__(
        self,
        fd: int,
        *,
        filename: str,
        read_only: bool,
        unmap: bool,
        flushes: bool,
    ) -> None:
        """``unmap``: discards reach the storage. ``flushes`` False: flush does nothing."""
        status = os.fstat(fd)
        mode = status.st_mode
        self.identity = (status.st_dev, status.st_ino)
        if stat.S_ISBLK(mode):
            self.identity = (-1, status.st_rdev)
        self.name = "file" if stat.S_ISREG(mode) else "host_device"
        self.filename = filename
        self.read_only = read_only
        self.is_device = not stat.S_ISREG(mode)
        self.size_bytes = _size_bytes(fd)
        self._fd = fd
        self._held_to_resize = False
        self.ignores_discards = not unmap
        self.flushes = flushes
        self.discards = Counts()
        self._flush_error: OSError | None = None
        self._keeps_writers_out = False
        #: Of punching and not, what the storage could not do to a range to make it zero.
        self._slow_zeroes: set[bool] = set()
        # A limiter of its own: a slow disk's threads never starve another disk.
        self._threads = trio.CapacityLimiter(limits.FILE_THREADS)
        self._reads_inline = True
        self._writes_inline = self.is_device or is_local(status.st_dev)
        self._writes_inline_from_ns = 0
        self._write_pause_ns = limits.INLINE_WRITE_PAUSE_MIN_NS
        self._waiting_writes: list[_Write] = []
        self._one_batch = trio.Lock()
        self._one_flush = trio.Lock()
        self._flushes_begun = 0
        self._flushes_done = 0

    @property
    def fd(self) -> int:
        return self._fd

    def take_over(self, before: Driver) -> None:
        """What was lost by the driver before stays lost, so flushes go on failing."""
        assert isinstance(before, FileDriver)
        # It may have grown since this one was opened.
        self.size_bytes = before.size_bytes
        rely_on_size(self._fd, self.filename, instead_of=before.fd)
        if before._held_to_resize and not self.read_only:  # noqa: SLF001 - one class
            self.hold_to_resize()
        self.discards = before.discards
        self._flush_error = before._flush_error  # noqa: SLF001 - one class
        if before._keeps_writers_out:  # noqa: SLF001 - one class
            self.keep_writers_out(beside_writer=True)

    def keep_writers_out(self, *, beside_writer: bool = False) -> None:
        # Whoever writes keeps them out anyway.
        if self.read_only:
            keep_writers_out(self._fd, self.filename, beside_writer=beside_writer)
        self._keeps_writers_out = True

    @contextmanager
    def letting_writer_in(self) -> Iterator[None]:
        """In the body one more descriptor of ours may begin to write. Blocks."""
        if not self._keeps_writers_out:
            yield
            return
        let_writers_in(self._fd)
        try:
            yield
        finally:
            keep_writers_out(self._fd, self.filename, beside_writer=True)

    def hold_to_resize(self) -> None:
        if not (self.is_device or self._held_to_resize):
            hold_to_resize(self._fd, self.filename)
            self._held_to_resize = True

    @contextmanager
    def _resizing(self) -> Iterator[None]:
        if self._held_to_resize:
            yield
            return
        with resizing(self._fd, self.filename):
            yield

    @property
    def path(self) -> str | None:
        return None if self.is_device else os.path.realpath(self.filename)

    def descriptor(self) -> Descriptor | None:
        return Descriptor(self._fd, 0)

    @property
    def takes_write_by(self) -> bool:
        return True

    # -- inline ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if not self._reads_inline:
            raise WouldBlock
        try:
            done = os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            raise WouldBlock from None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._reads_inline = False
            raise WouldBlock from None
        if done != len(view):
            raise WouldBlock

    def write_nowait(self, offset: int, view: memoryview) -> None:
        """A buffered write has no NOWAIT on most file systems, so it is watched instead.

        When one took long (dirty throttling, a cold partial page), this file's writes go to a
        thread for a while, so that the loop meets a slow disk now and then and not at every
        write: longer each time, as the write may only have lost the processor for once. With a
        large one, and with all after a slow one, that can be told: the thread then did not give
        the processor up by itself.
        """
        if not self._writes_inline:
            raise WouldBlock
        paused = self._writes_inline_from_ns
        if paused and time.monotonic_ns() < paused:
            raise WouldBlock
        waits = _waits() if paused or len(view) >= limits.INLINE_WRITE_LARGE_BYTES else None
        started_ns = time.monotonic_ns()
        done = os.pwrite(self._fd, view, offset)
        ended_ns = time.monotonic_ns()
        if ended_ns - started_ns > limits.INLINE_WRITE_SLOW_NS and _waits() != waits:
            self._pause_inline_writes(ended_ns)
        if done != len(view):
            blocking.write(self._fd, offset + done, view[done:])

    def _pause_inline_writes(self, now_ns: int) -> None:
        last_ended_ns = self._writes_inline_from_ns
        if now_ns - last_ended_ns > limits.INLINE_WRITE_PAUSE_MAX_NS:
            self._write_pause_ns = limits.INLINE_WRITE_PAUSE_MIN_NS
        else:
            doubled_ns = self._write_pause_ns * 2
            self._write_pause_ns = min(doubled_ns, limits.INLINE_WRITE_PAUSE_MAX_NS)
        self._writes_inline_from_ns = now_ns + self._write_pause_ns

    # -- in threads --------------------------------------------------------------------------

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await trio.to_thread.run_sync(call, limiter=self._threads)

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        return await self._in_thread(lambda: call(Descriptor(self._fd, 0), offset + length))

    async def read(self, offset: int, view: memoryview) -> None:
        await self._in_thread(lambda: blocking.read(self._fd, offset, view))

    async def write(self, offset: int, view: memoryview) -> None:
        """All writes that wait share one hop to a thread; buffered ones gain nothing from two.

        Shielded: a write that a thread has begun takes effect, so it ends before its caller.
        """
        write = _Write(offset, view)
        self._waiting_writes.append(write)
        with trio.CancelScope(shield=True):
            async with self._one_batch:
                if not write.ended:
                    batch, self._waiting_writes = self._waiting_writes, []
                    await self._send_batch(batch)
        if write.error is not None:
            raise write.error

    async def _send_batch(self, batch: Sequence[_Write]) -> None:
        try:
            await self._in_thread(lambda: self._write_batch(batch))
        except Exception as error:  # noqa: BLE001 - each write raises it to its own caller
            # No thread could be had, say: then nothing was written, for any of them.
            for write in batch:
                if not write.ended:
                    write.error, write.ended = error, True

    def _write_batch(self, batch: Sequence[_Write]) -> None:
        for write in batch:
            try:
                self._write(write.offset, write.view)
            except OSError as error:
                write.error = error
            write.ended = True

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        punch = unmap and not self.ignores_discards
        await self._in_thread(lambda: self._zero(offset, length, punch=punch))

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        """The first zeroes that had to be written tell that all have to be."""
        return (unmap and not self.ignores_discards) not in self._slow_zeroes

    def _zero(self, offset: int, length: int, *, punch: bool) -> None:
        if blocking.zero_range(self._fd, offset, length, punch=punch):
            return
        self._slow_zeroes.add(punch)
        for at in range(0, length, len(_ZEROES)):
            self._write(offset + at, _ZEROES[: length - at])

    def _write(self, offset: int, view: memoryview) -> None:
        """The write itself, in a thread."""
        blocking.write(self._fd, offset, view)

    async def discard(self, offset: int, length: int) -> None:
        if self.ignores_discards:
            return
        discard = blocking.discard_device if self.is_device else blocking.discard_file
        with self.discards.of(length):
            await self._in_thread(lambda: discard(self._fd, offset, length))

    async def flush(self) -> None:
        """``OSError`` for ever after one failure.

        The kernel drops the pages that it could not write and reports that once, to one caller:
        an fdatasync that succeeds later, or at the same time, says nothing about them. So there
        is one at a time, and those who wait meanwhile share the next.
        """
        if not self.flushes or self.read_only:
            return
        wanted = self._flushes_begun + 1
        async with self._one_flush:
            if self._flush_error is None and self._flushes_done < wanted:
                await self._flush_now()
        if self._flush_error is not None:
            raise OSError(self._flush_error.errno, self._flush_error.strerror)

    async def _flush_now(self) -> None:
        self._flushes_begun += 1
        number = self._flushes_begun

        def call() -> None:
            try:
                blocking.sync(self._fd)
            except OSError as error:
                # Kept from here, because nobody may wait for this thread any more.
                self._flush_error = error

        # A disk that hangs must not keep the daemon, or a job, from ending.
        await trio.to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)
        self._flushes_done = number

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        return await self._in_thread(lambda: blocking.allocation(self._fd, offset, length))

    async def make_empty(self) -> None:
        """Drop all content: what is left is ``size_bytes`` of zeroes. Raises ``OSError``."""

        def call() -> None:
            with self._resizing():
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, self.size_bytes)

        await self._in_thread(call)

    async def truncate(self, size_bytes: int) -> None:
        """A device only takes over the size that it has now, where that is enough."""

        def call() -> int:
            if not self.is_device:
                with self._resizing():
                    os.ftruncate(self._fd, size_bytes)
            elif size_bytes > _size_bytes(self._fd):
                raise BlockdError("Cannot grow device files")
            return _size_bytes(self._fd)

        self.size_bytes = await self._in_thread(call)

    async def make_read_only(self) -> None:
        await self._in_thread(self._end_writing)
        self.read_only, self._held_to_resize = True, False

    def _end_writing(self) -> None:
        end_writing(self._fd)
        if not self._keeps_writers_out:
            let_writers_in(self._fd)

    async def allocated_bytes(self) -> int:
        return await self._in_thread(lambda: os.fstat(self._fd).st_blocks * SECTOR_BYTES)

    async def close(self) -> None:
        await self._in_thread(lambda: os.close(self._fd))


def _waits() -> int:
    """How often this thread has waited for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _size_bytes(fd: int) -> int:
    return -(-os.lseek(fd, 0, os.SEEK_END) // SECTOR_BYTES) * SECTOR_BYTES
