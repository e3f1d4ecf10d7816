"""A driver over a bytearray that does what the test's script says."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from blockd.block import Allocation, Driver, WriteBy
from blockd.errors import WouldBlock
from blockd.extent import Extent
from tests.helpers.memory_descriptor import memory_descriptor

#: What a failed write leaves in the first half of its range.
TORN = 0xEE


@dataclass(eq=False)
class Fault:
    """The ``nth`` operation of a name, and ``times - 1`` after it, fail with ``errno``."""

    operation: str
    nth: int
    errno: int
    times: int
    hits: int = 0

    def strikes(self, operation: str, count: int) -> bool:
        if operation != self.operation or not self.nth <= count < self.nth + self.times:
            return False
        self.hits += 1
        return True


@dataclass(eq=False)
class Hold:
    """The ``nth`` operation of a name, and all after it, wait until ``release``.

    A ``with`` block releases it at its end, also where the test fails.
    """

    operation: str
    nth: int
    reached: trio.Event = field(default_factory=trio.Event)
    _released: trio.Event = field(default_factory=trio.Event)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._released.set()

    async def wait(self) -> None:
        self.reached.set()
        await self._released.wait()


class MemoryDriver(Driver):
    """Bytes in memory, with scripted faults, pauses and refusals.

    Operations are counted from 1 by name: ``read`` (also the nowait ones that are not refused),
    ``write``, ``write_zeroes``, ``discard``, ``flush``, ``allocation`` and ``truncate``. Each
    takes effect in one step, at its end; ``reads`` are the ranges that were read. ``durable`` is
    what a power cut would leave.
    """

    def __init__(
        self,
        content: bytes | bytearray | int,
        *,
        cluster_size_bytes: int | None = None,
        read_only: bool = False,
        page_bytes: int = 512,
    ) -> None:
        """``content`` may be a size. Pages of only zeroes are holes to ``allocation``."""
        self.name = "memory"
        self.filename = "memory"
        self.data = bytearray(content)
        self.durable = bytes(self.data)
        self.size_bytes = len(self.data)
        self.cluster_size_bytes = cluster_size_bytes
        self.read_only = read_only
        self.closed = False
        self.counts: Counter[str] = Counter()
        self.reads: list[Extent] = []
        #: Asked before each nowait call, with its name: whether it may be done so.
        self.nowait: Callable[[str], bool] = lambda _: False
        #: Asked before each other call: how many turns the scheduler gets before it ends.
        self.delay: Callable[[str], int] = lambda _: 0
        #: Whatever reads or writes one of these bytes fails with EIO.
        self.bad = range(0)
        #: Like one in a worker thread, an operation can't be cancelled; it ends as if it were not.
        self.stubborn = False
        self._page_bytes = page_bytes
        self._faults: list[Fault] = []
        self._holds: list[Hold] = []

    # -- the script --------------------------------------------------------------------------

    def fail(self, operation: str, number: int, *, nth: int = 1, times: int = 1) -> Fault:
        """Let an operation fail with an errno, counted from now on."""
        fault = Fault(operation, self.counts[operation] + nth, number, times)
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget the faults that have not struck yet."""
        self._faults.clear()

    def hold(self, operation: str, *, nth: int = 1) -> Hold:
        """Let operations wait, counted from now on."""
        hold = Hold(operation, self.counts[operation] + nth)
        self._holds.append(hold)
        return hold

    def lose_power(self) -> None:
        """Forget everything that was not flushed."""
        self.data[:] = self.durable

    # -- what a driver does ------------------------------------------------------------------

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if not self.nowait("read"):
            raise WouldBlock
        self._fill(self._count("read"), offset, view)

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if not self.nowait("write"):
            raise WouldBlock
        self._change("write", self._count("write"), offset, bytes(view))

    async def read(self, offset: int, view: memoryview) -> None:
        self._fill(await self._begin("read"), offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        count = await self._begin("write")
        self._change("write", count, offset, bytes(view))

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        """For those who don't ask whether it ``takes_write_by``."""
        return await trio.to_thread.run_sync(call, memory_descriptor(self), offset + length)

    def read_now(self, offset: int, view: memoryview) -> None:
        self._fill(self._count("read"), offset, view)

    def write_now(self, offset: int, view: memoryview) -> None:
        self._change("write", self._count("write"), offset, bytes(view))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        count = await self._begin("write_zeroes")
        self._change("write_zeroes", count, offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        count = await self._begin("discard")
        self._change("discard", count, offset, bytes(length))

    async def flush(self) -> None:
        count = await self._begin("flush")
        self._raise_fault("flush", count)
        self.durable = bytes(self.data)

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        count = await self._begin("allocation")
        self._raise_fault("allocation", count)
        runs: list[Allocation] = []
        end = offset + length
        while offset < end:
            stop = min((offset // self._page_bytes + 1) * self._page_bytes, end)
            zero = not any(self.data[offset:stop])
            if runs and runs[-1].zero == zero:
                offset = runs.pop().extent.offset
            runs.append(Allocation(Extent(offset, stop - offset), zero))
            offset = stop
        return runs

    async def truncate(self, size_bytes: int) -> None:
        count = await self._begin("truncate")
        self._raise_fault("truncate", count)
        del self.data[size_bytes:]
        self.data.extend(bytes(size_bytes - len(self.data)))
        self.size_bytes = size_bytes

    async def allocated_bytes(self) -> int:
        return sum(each.extent.length for each in await self.allocation(0, self.size_bytes))

    async def close(self) -> None:
        assert not self.closed
        self.closed = True

    # -- how it does it ----------------------------------------------------------------------

    def _count(self, operation: str) -> int:
        assert not self.closed
        self.counts[operation] += 1
        return self.counts[operation]

    async def _begin(self, operation: str) -> int:
        with trio.CancelScope(shield=self.stubborn):
            await trio.lowlevel.checkpoint()
            count = self._count(operation)
            hold = self.find_hold(operation, count)
            if hold is not None:
                await hold.wait()
            for _ in range(self.delay(operation)):
                await trio.lowlevel.checkpoint()
        return count

    def find_hold(self, operation: str, count: int) -> Hold | None:
        """What the ``count``-th operation of a name must wait for."""
        for hold in self._holds:
            if operation == hold.operation and count >= hold.nth:
                return hold
        return None

    def _check_sectors(self, offset: int, length: int) -> None:
        if max(offset, self.bad.start) < min(offset + length, self.bad.stop):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _raise_fault(self, operation: str, count: int) -> None:
        for fault in self._faults:
            if fault.strikes(operation, count):
                raise OSError(fault.errno, os.strerror(fault.errno))

    def _fill(self, count: int, offset: int, view: memoryview) -> None:
        self._raise_fault("read", count)
        self._check_sectors(offset, len(view))
        self.reads.append(Extent(offset, len(view)))
        view[:] = self.data[offset : offset + len(view)]

    def _change(self, operation: str, count: int, offset: int, data: bytes) -> None:
        assert not self.read_only
        assert 0 <= offset <= offset + len(data) <= self.size_bytes
        try:
            self._raise_fault(operation, count)
            self._check_sectors(offset, len(data))
        except OSError:
            half = (len(data) + 1) // 2
            self.data[offset : offset + half] = bytes([TORN]) * half
            raise
        self.data[offset : offset + len(data)] = data
