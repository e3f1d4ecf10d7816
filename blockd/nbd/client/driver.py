"""``nbd``: an export of another server, by one connection that comes back when it is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import trio

from blockd import limits
from blockd.block import Allocation, Driver, Reservations
from blockd.errors import BlockdError
from blockd.extent import Extent
from blockd.nbd.client.connecting import Target, connect
from blockd.nbd.client.connection import Connection
from blockd.nbd.wire import Cmd, CmdFlag, State, TransmissionFlag

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

#: The longest request without data that a header which is not extended has room for.
_LENGTH_MAX: Final = (1 << 32) - 1


class NbdDriver(Driver):
    """All requests are sent again on a new connection where one was lost before its reply came.

    For ``reconnect_delay_seconds`` after the loss they wait for the server to come back; then
    they fail, and each that comes makes one more attempt now and then.
    """

    name = "nbd"

    def __init__(
        self,
        target: Target,
        connection: Connection,
        tasks: trio.Nursery,
        *,
        read_only: bool,
        reconnect_delay_seconds: float = 0,
    ) -> None:
        export = connection.export
        self.read_only = read_only
        self.size_bytes = export.size_bytes
        self.filename = target.uri
        self.flushes = TransmissionFlag.SEND_FLUSH in export.flags
        self._target = target
        self._tasks = tasks
        self._delay_seconds = reconnect_delay_seconds
        self._connecting = trio.Lock()
        self._slots = trio.CapacityLimiter(limits.NBD_CLIENT_REQUESTS)
        self._reservations = Reservations()
        self._attempted_at = float("-inf")
        #: Writes that were answered, and how many of them before the last flush.
        self._writes = self._flushed_writes = 0
        self._use(connection)

    @classmethod
    async def open(
        cls,
        target: Target,
        tasks: trio.Nursery,
        *,
        read_only: bool,
        auto_read_only: bool,
        open_timeout_seconds: float = 0,
        reconnect_delay_seconds: float = 0,
    ) -> NbdDriver:
        """Connect, and try again for so long where nobody answers. Raises ``BlockdError``."""
        connection = await _connect_within(target, open_timeout_seconds)
        if TransmissionFlag.READ_ONLY in connection.export.flags and not read_only:
            if not auto_read_only:
                await connection.disconnect()
                raise BlockdError("Could not open image: Permission denied")
            read_only = True
        return cls(
            target,
            connection,
            tasks,
            read_only=read_only,
            reconnect_delay_seconds=reconnect_delay_seconds,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"driver": self.name, **self._target.options}

    # -- the connection ------------------------------------------------------------------------

    def _use(self, connection: Connection) -> None:
        self._connection = connection
        self._tasks.start_soon(connection.receive)

    async def _ask(
        self,
        request: Callable[Concatenate[Connection, _Params], Awaitable[_Result]],
        *args: _Params.args,
        **kwargs: _Params.kwargs,
    ) -> _Result:
        """Make ``request``, again on each new connection until it has been answered."""
        async with self._slots:
            while True:
                connection = await self._connected()
                try:
                    return await request(connection, *args, **kwargs)
                except ConnectionError:
                    if connection.lost is None:
                        raise

    async def _alter(
        self,
        request: Callable[Concatenate[Connection, _Params], Awaitable[None]],
        *args: _Params.args,
        **kwargs: _Params.kwargs,
    ) -> None:
        """As ``_ask``, for what a flush is to make durable."""
        await self._ask(request, *args, **kwargs)
        self._writes += 1

    async def _connected(self) -> Connection:
        """A connection, a new one if need be; ``OSError`` where there is none in time."""
        if self._connection.lost is None:
            return self._connection
        async with self._connecting:
            if self._connection.lost is None:
                return self._connection
            await self._connect_again()
        return self._connection

    async def _connect_again(self) -> None:
        deadline = self._connection.lost_at + self._delay_seconds
        pause_seconds = limits.NBD_CLIENT_PAUSE_MIN_SECONDS
        while True:
            now = trio.current_time()
            if deadline <= now < self._attempted_at + limits.NBD_CLIENT_PAUSE_MAX_SECONDS:
                raise OSError(errno.EIO, "the NBD server is not there")
            self._attempted_at = now
            try:
                self._take_over(await connect(self._target))
            except (OSError, BlockdError) as error:
                if trio.current_time() >= deadline:
                    raise OSError(errno.EIO, f"the NBD server is not there: {error}") from error
            else:
                return
            await trio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 2, limits.NBD_CLIENT_PAUSE_MAX_SECONDS)

    def _take_over(self, connection: Connection) -> None:
        """Go on with a new connection, if it leads to what the old one led to."""
        old, new = self._connection.export, connection.export
        if (old.size_bytes, old.minimum_bytes) != (new.size_bytes, new.minimum_bytes):
            connection.close()
            raise BlockdError("the export has changed its size or block size")
        if not self.read_only and TransmissionFlag.READ_ONLY in new.flags:
            connection.close()
            raise BlockdError("the export has become read-only")
        if new.headers < old.headers or new.maximum_bytes < old.maximum_bytes:
            # Requests wait that have been cut for the old one.
            connection.close()
            raise BlockdError("the server takes shorter requests than before")
        if self._writes != self._flushed_writes:
            self.doubts += 1
        self._use(connection)

    async def close(self) -> None:
        await self._connection.disconnect()

    # -- requests ------------------------------------------------------------------------------

    def _blocks(self, offset: int, length: int) -> Extent:
        """The range, with the whole blocks that the server wants."""
        unit = self._connection.export.minimum_bytes
        start = offset // unit * unit
        return Extent(start, -(-(offset + length) // unit) * unit - start)

    def _can(self, flag: TransmissionFlag) -> bool:
        return flag in self._connection.export.flags

    async def read(self, offset: int, view: memoryview) -> None:
        step = self._connection.export.maximum_bytes
        blocks = self._blocks(offset, len(view))
        whole = blocks == (offset, len(view))
        memory = view if whole else memoryview(bytearray(blocks.length))
        for at in range(0, blocks.length, step):
            start, piece = blocks.offset + at, memory[at : at + step]
            await self._ask(Connection.read, start, piece)
        if not whole:
            view[:] = memory[offset - blocks.offset :][: len(view)]

    async def write(self, offset: int, view: memoryview) -> None:
        if self._connection.export.minimum_bytes == 1:
            await self._write(offset, view)
            return
        blocks = self._blocks(offset, len(view))
        async with self._reservations.reserve(blocks):
            await self._write(blocks.offset, await self._filled_up(blocks, offset, view))

    async def _filled_up(self, blocks: Extent, offset: int, view: memoryview) -> memoryview:
        """``view`` with what stands beside it in its first and last block."""
        if blocks == (offset, len(view)):
            return view
        unit = self._connection.export.minimum_bytes
        memory = memoryview(bytearray(blocks.length))
        await self.read(blocks.offset, memory[:unit])
        await self.read(blocks.end - unit, memory[-unit:])
        start = offset - blocks.offset
        memory[start : start + len(view)] = view
        return memory

    async def _write(self, offset: int, view: memoryview) -> None:
        step = self._connection.export.maximum_bytes
        for at in range(0, len(view), step):
            start, piece = offset + at, view[at : at + step]
            await self._alter(Connection.write, start, piece)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        inner = self._inner(offset, length)
        if not self._can(TransmissionFlag.SEND_WRITE_ZEROES) or not inner.length:
            await self._write_zero_bytes(offset, length)
            return
        await self._write_zero_bytes(offset, inner.offset - offset)
        await self._change(Cmd.WRITE_ZEROES, inner, 0 if unmap else CmdFlag.NO_HOLE)
        await self._write_zero_bytes(inner.end, offset + length - inner.end)

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        # However the server makes them, they need not be sent to it.
        can = self._can(TransmissionFlag.SEND_WRITE_ZEROES)
        return can and self._inner(offset, length).length > 0

    async def _write_zero_bytes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, limits.MIB)))
        for at in range(0, length, limits.MIB):
            await self.write(offset + at, zeroes[: length - at])

    async def discard(self, offset: int, length: int) -> None:
        inner = self._inner(offset, length)
        if self._can(TransmissionFlag.SEND_TRIM) and inner.length:
            await self._change(Cmd.TRIM, inner)

    def _inner(self, offset: int, length: int) -> Extent:
        """The whole blocks within the range."""
        unit = self._connection.export.minimum_bytes
        start = -(-offset // unit) * unit
        return Extent(start, max((offset + length) // unit * unit - start, 0))

    async def _change(self, command: Cmd, extent: Extent, flags: int = 0) -> None:
        step = self._length_max()
        async with self._reservations.reserve(extent):
            for start in range(extent.offset, extent.end, step):
                length = min(step, extent.end - start)
                await self._alter(Connection.change, command, start, length, flags)

    def _length_max(self) -> int:
        """How long a request without data may be: whole blocks."""
        export = self._connection.export
        unit = export.minimum_bytes
        return self.size_bytes if export.extended else _LENGTH_MAX // unit * unit

    async def flush(self) -> None:
        if self.read_only or not self.flushes:
            return
        # One that is answered only after this is not sure to be covered.
        writes = self._writes
        await self._ask(Connection.change, Cmd.FLUSH, 0, 0)
        self._flushed_writes = writes

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        if self._connection.export.context_id is None:
            return [Allocation(Extent(offset, length), zero=False)]
        # What is shorter by a block at least still fits once it is rounded up to whole ones.
        longest = length if self._connection.export.extended else _LENGTH_MAX // 2
        blocks = self._blocks(offset, min(length, longest))
        told = await self._ask(Connection.block_status, *blocks)
        runs: list[Allocation] = []
        start, end = blocks.offset, offset + length
        for run_bytes, flags in zip(*told, strict=True):
            first, last = max(start, offset), min(start + run_bytes, end)
            if first < last:
                runs.append(self._allocation(Extent(first, last - first), flags))
            if start >= end or len(runs) >= limits.ALLOCATION_RUNS_LIMIT:
                break
            start += run_bytes
        return runs or [Allocation(Extent(offset, length), zero=False)]

    def _allocation(self, extent: Extent, flags: int) -> Allocation:
        if self._target.dirty_bitmap is None:
            return Allocation(extent, zero=bool(flags & State.ZERO))
        # As in QEMU, what is dirty is told as not allocated; but it says nothing about zeroes.
        return Allocation(extent, zero=False, depth=0 if flags & State.HOLE else 1)

    async def truncate(self, size_bytes: int) -> None:
        raise BlockdError("Cannot resize NBD nodes")

    async def allocated_bytes(self) -> int:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


async def _connect_within(target: Target, seconds: float) -> Connection:
    deadline = trio.current_time() + seconds
    while True:
        try:
            return await connect(target)
        except BlockdError:
            if trio.current_time() >= deadline:
                raise
        await trio.sleep(limits.NBD_CLIENT_PAUSE_MIN_SECONDS)
