"""One client in the transmission phase: requests in, replies out.

The shape of this file is what makes it fast. All complete requests of one ``recv`` are run inline
(``_burst``) and answered with one ``send``; only a request that can't finish at once costs a task.
Replies may leave in another order than their requests came, as NBD allows.
"""

from __future__ import annotations

import errno
import os
import time
from enum import Enum, auto

import trio

from blockd import limits
from blockd.errors import WouldBlock
from blockd.nbd.channel import Channel, ClientGone
from blockd.nbd.chunks import error_reply
from blockd.nbd.export import Export, RequestError
from blockd.nbd.replies import SimpleReplies, StructuredReplies
from blockd.nbd.wire import (
    CMD_READ,
    CMD_WRITE,
    REQUEST,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    ProtocolError,
    Request,
    parse_request,
)

_unpack_request = REQUEST.unpack_from
_REQUEST_BYTES = REQUEST.size


class _Stop(Enum):
    """Why a burst ended."""

    NEED_DATA = auto()
    #: For replies; or it has been enough for one turn.
    NEED_ROOM = auto()
    END_OF_TURN = auto()
    SLOW_REQUEST = auto()


# Looked up once, for the hot loop: to find an enum's member takes a tenth of a request's time.
_NEED_DATA, _NEED_ROOM, _END_OF_TURN, _SLOW_REQUEST = _Stop
_BURST = range(limits.NBD_BURST_REQUESTS)


class Connection:
    """Serves ``export`` to the client behind ``channel`` until that goes."""

    def __init__(
        self,
        channel: Channel,
        export: Export,
        *,
        structured: bool,
        early: bytes,
    ) -> None:
        """``early``: what the client sent behind its last option."""
        self._channel = channel
        self._export = export
        self._replies = StructuredReplies() if structured else SimpleReplies()
        self._in = bytearray(limits.NBD_RECEIVE_BUFFER_BYTES)
        self._in_view = memoryview(self._in)
        self._in[: len(early)] = early
        self._early_bytes = len(early)
        self._out = bytearray(limits.NBD_SEND_BUFFER_BYTES)
        self._out_view = memoryview(self._out)
        self._out_used = 0
        self._running = 0
        self._running_bytes = 0
        self._one_ended = trio.Event()

    async def serve(self) -> None:
        """Return when the client has gone. Raises ``ProtocolError`` for what is no NBD."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if not await self._receive():
                    # The client is gone; nobody is left to hear of what still runs.
                    nursery.cancel_scope.cancel()
        except* (ClientGone, ConnectionError):
            pass

    async def _receive(self) -> bool:
        """Take requests until the end; whether the client said goodbye (NBD_CMD_DISC)."""
        start, end = 0, self._early_bytes
        while True:
            stop = _NEED_ROOM
            while stop is not _NEED_DATA:
                start, stop = self._burst(start, end)
                if self._out_used:
                    await self._channel.send_burst(self._out_view[: self._out_used])
                    self._out_used = 0
                if stop is _END_OF_TURN:
                    await self._channel.end_turn()
                elif stop is _NEED_ROOM:
                    await self._channel.end_turn_if_over()
                elif stop is _SLOW_REQUEST:
                    request = parse_request(self._in_view, start)
                    assert request is not None
                    if request.type == Cmd.DISC:
                        return True
                    start, end = await self._run_slow(request, start + _REQUEST_BYTES, end)
            if start == end:
                start = end = 0
            elif len(self._in) - end < limits.NBD_RECEIVE_ROOM_BYTES:
                start, end = self._move_to_front(start, end)
            view = self._in_view[end:]
            count = await self._channel.receive_into(view, spin=not self._running)
            if not count:
                return False
            end += count

    # -- requests that finish at once ---------------------------------------------------------

    def _burst(self, start: int, end: int) -> tuple[int, _Stop]:  # noqa: PLR0915 - calls cost
        """Run the requests in ``_in[start:end]`` up to the first that can't finish at once.

        Their replies are put into ``_out``. This is the hot loop: local names, no calls but
        those that do the work. Whatever is unusual, even an error, is left to ``_run_slow``.
        """
        view, out, used = self._in_view, self._out_view, self._out_used
        node, replies = self._export.node, self._replies
        read_nowait, write_nowait = node.read_nowait, self._export.write_nowait
        put_done, done_bytes = replies.put_done, replies.done_bytes
        header_bytes = replies.data_header_bytes
        size, room, inline = node.size_bytes, limits.NBD_SEND_BYTES, len(out) - header_bytes
        # Flags with which a write may run inline: none, and none at all on such an export.
        plain = 0 if self._export.writable and not self._export.writethrough else -1
        stop = _END_OF_TURN
        monotonic = time.monotonic
        began = monotonic()
        turn_ends = began + limits.NBD_SLICE_SECONDS
        first, filled = start, used
        done = writes = highest = 0
        try:
            for done in _BURST:  # noqa: B007 - it is looked at afterwards
                if end - start < _REQUEST_BYTES:
                    stop = _NEED_DATA
                    break
                magic, flags, kind, cookie, offset, length = _unpack_request(view, start)
                data = start + _REQUEST_BYTES
                if magic != REQUEST_MAGIC or not 0 < length <= inline or offset + length > size:
                    stop = _SLOW_REQUEST
                    break
                if used + header_bytes + length > room and used:
                    stop = _NEED_ROOM
                    break
                if kind == CMD_WRITE and flags == plain:
                    if data + length > end:
                        stop = _NEED_DATA if length <= limits.NBD_GATHER_BYTES else _SLOW_REQUEST
                        break
                    write_nowait(offset, view[data : data + length])
                    start = data + length
                    put_done(out, used, cookie, offset)
                    used += done_bytes
                    writes += 1
                    if offset + length > highest:  # noqa: PLR1730 - a call costs more
                        highest = offset + length
                    # A cached read takes microseconds, but a write may meet a slow disk.
                    if monotonic() > turn_ends:
                        break
                elif kind == CMD_READ and not flags:
                    body = used + header_bytes
                    read_nowait(offset, out[body : body + length])
                    start = data
                    replies.put_data_header(out, used, cookie, offset, length)
                    used = body + length
                else:
                    stop = _SLOW_REQUEST
                    break
        except (WouldBlock, OSError):
            stop = _SLOW_REQUEST
        self._out_used = used
        # Only at the end of its turn was the last request carried out too.
        done += stop is _END_OF_TURN
        if done:
            reads = done - writes
            read_bytes = used - filled - reads * header_bytes - writes * done_bytes
            write_bytes = start - first - done * _REQUEST_BYTES
            node.inline.add(reads, read_bytes, writes, write_bytes, highest, monotonic() - began)
        return start, stop

    # -- all others ---------------------------------------------------------------------------

    async def _run_slow(self, request: Request, start: int, end: int) -> tuple[int, int]:
        """Run one request whose payload, if it has one, begins at ``_in[start]``.

        Or only receive its payload. Returns where the bytes that are to be looked at next begin
        and end.
        """
        payload = request.length if request.type == CMD_WRITE else 0
        try:
            self._export.check(request)
        except RequestError as refusal:
            self._export.count_refused(request)
            if payload > limits.NBD_PAYLOAD_BYTES:
                raise ProtocolError(refusal.message) from None
            start, end = await self._skip(payload, start, end)
            await self._send_error(request, refusal.errno, refusal.message)
            return start, end
        if payload > limits.NBD_STREAM_BYTES:
            return await self._stream_write(request, start, end)
        if end - start < payload:
            # With its payload there, it may be one to finish at once.
            start -= _REQUEST_BYTES
            return await self._fill(_REQUEST_BYTES + payload, start, end)
        data = bytearray(self._in_view[start : start + payload])
        await self._start(request, data)
        return start + payload, end

    async def _start(self, request: Request, data: bytearray) -> None:
        """Run a checked request in a task of its own, once there is room for one more."""
        weight = request.length if request.type in (CMD_READ, CMD_WRITE) else 0
        while self._running >= limits.NBD_REQUESTS_IN_FLIGHT or (
            self._running and self._running_bytes + weight > limits.NBD_BYTES_IN_FLIGHT
        ):
            await self._one_ended.wait()
        self._running += 1
        self._running_bytes += weight
        self._nursery.start_soon(self._run, request, data, weight)

    async def _run(self, request: Request, payload: bytearray, weight: int) -> None:
        try:
            try:
                if request.type == CMD_READ and request.length:
                    reply = await self._read(request)
                else:
                    await self._export.run(request, memoryview(payload))
                    reply = [self._done(request)]
            except OSError as error:
                await self._send_failure(request, error)
            else:
                await self._channel.send(*reply)
        finally:
            self._running -= 1
            self._running_bytes -= weight
            self._one_ended.set()
            self._one_ended = trio.Event()

    async def _read(self, request: Request) -> list[memoryview]:
        """Run a READ; its whole reply, in parts.

        One part would do, but to clear the memory for the largest would stop the loop for 40 ms.
        """
        parts: list[memoryview] = []
        header = self._replies.data_header_bytes
        for at in range(0, request.length, limits.NBD_READ_PIECE_BYTES):
            count = min(request.length - at, limits.NBD_READ_PIECE_BYTES)
            part = memoryview(bytearray(header + count))
            if count < request.length:
                await self._read_piece(request.offset + at, part[header:])
            else:
                # A small one was tried at once before.
                await self._export.node.read(request.offset + at, part[header:])
            parts.append(part)
            header = 0
        self._replies.put_data_header(parts[0], 0, request.cookie, request.offset, request.length)
        return parts

    async def _read_piece(self, offset: int, piece: memoryview) -> None:
        node, began = self._export.node, time.monotonic()
        try:
            node.read_nowait(offset, piece)
        except WouldBlock:
            await node.read(offset, piece)
        except OSError:
            node.accounts.read.failed += 1
            raise
        else:
            node.inline.add(1, len(piece), 0, 0, 0, time.monotonic() - began)
            await self._channel.end_turn_if_over()

    async def _stream_write(self, request: Request, start: int, end: int) -> tuple[int, int]:
        """Write a large payload piece by piece, each while it is warm in the cache.

        Pieces end where clusters do, so that an image never has to fill one up around a piece.
        """
        offset = request.offset
        left = request.length
        failure: OSError | None = None
        while left:
            count = min(left, limits.NBD_STREAM_BYTES - offset % limits.NBD_STREAM_BYTES)
            start, end = await self._fill(count, start, end)
            if failure is None:
                failure = await self._write_piece(offset, self._in_view[start : start + count])
            start += count
            offset += count
            left -= count
        if failure is None and (request.flags & CmdFlag.FUA or self._export.writethrough):
            try:
                await self._export.node.flush()
            except OSError as error:
                failure = error
        if failure is not None:
            await self._send_failure(request, failure)
        else:
            await self._channel.send(self._done(request))
        return start, end

    async def _write_piece(self, offset: int, piece: memoryview) -> OSError | None:
        node, began = self._export.node, time.monotonic()
        try:
            self._export.write_nowait(offset, piece)
        except WouldBlock:
            try:
                await self._export.write(offset, piece)
            except OSError as error:
                return error
        except OSError as error:
            node.accounts.write.failed += 1
            return error
        else:
            length, seconds = len(piece), time.monotonic() - began
            node.inline.add(0, 0, 1, length, offset + length, seconds)
        return None

    async def _skip(self, count: int, start: int, end: int) -> tuple[int, int]:
        """Read over a refused request's payload."""
        while count > end - start:
            count -= end - start
            start = 0
            end = await self._channel.receive_some_into(self._in_view)
        return start + count, end

    async def _fill(self, count: int, start: int, end: int) -> tuple[int, int]:
        """Have ``count`` bytes in the buffer, which they fit into; where they begin and end.

        No more than these are received: what comes behind them would have to be moved later.
        """
        if start == end:
            start = end = 0
        elif start + count > len(self._in):
            start, end = self._move_to_front(start, end)
        while end < start + count:
            end += await self._channel.receive_some_into(self._in_view[end : start + count])
        return start, end

    def _move_to_front(self, start: int, end: int) -> tuple[int, int]:
        end -= start
        self._in_view[:end] = self._in_view[start : start + end]
        return 0, end

    # -- replies ------------------------------------------------------------------------------

    def _done(self, request: Request) -> memoryview:
        """The reply to a request that succeeded and has no data to return."""
        if request.type == CMD_READ:
            return memoryview(self._replies.empty_read(request))
        reply = memoryview(bytearray(self._replies.done_bytes))
        self._replies.put_done(reply, 0, request.cookie, request.offset)
        return reply

    async def _send_failure(self, request: Request, error: OSError) -> None:
        number = error.errno or errno.EIO
        await self._send_error(request, number, os.strerror(number))

    async def _send_error(self, request: Request, number: int, message: str) -> None:
        reply = error_reply(request, number, message, self._replies.headers)
        await self._channel.send(memoryview(reply))
