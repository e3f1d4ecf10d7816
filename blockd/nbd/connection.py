"""One client in the transmission phase: requests in, replies out.

The shape of this file is what makes it fast. All complete requests of one ``recv`` are run inline
(``_burst``) and answered with one ``send``; only a request that can't finish at once costs a task.
Replies may leave in another order than their requests came, as NBD allows.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

import trio

from blockd import limits
from blockd.errors import WouldBlock
from blockd.nbd.channel import Channel, ClientGone
from blockd.nbd.chunks import parse_status_filter
from blockd.nbd.export import Export, RequestError
from blockd.nbd.memory import Burst, Memory
from blockd.nbd.replies import replies_of
from blockd.nbd.running import Running
from blockd.nbd.wire import (
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    Headers,
    ProtocolError,
    Request,
    parse_request,
)


class _Stop(Enum):
    """Why a burst ended."""

    NEED_DATA = auto()
    #: The rest of a large plain write's.
    NEED_PAYLOAD = auto()
    #: For replies; or it has been enough for one turn.
    NEED_ROOM = auto()
    END_OF_TURN = auto()
    SLOW_REQUEST = auto()


# Looked up once, for the hot loop: to find an enum's member takes a tenth of a request's time.
_NEED_DATA, _NEED_PAYLOAD, _NEED_ROOM, _END_OF_TURN, _SLOW_REQUEST = _Stop
_BURST = range(limits.NBD_BURST_REQUESTS)

_BAD_FILTER: Final = "CMD_BLOCK_STATUS payload not valid"


class Connection:
    """Serves ``export`` to the client behind ``channel`` until that goes."""

    def __init__(
        self,
        channel: Channel,
        export: Export,
        *,
        headers: Headers,
        contexts: Sequence[int],
        early: bytes,
        memory: Memory,
    ) -> None:
        """``contexts``: those selected; ``early``: what the client sent behind its last option."""
        self._channel = channel
        self._export = export
        self._contexts = contexts
        self._replies = replies_of(headers)
        self._headers = headers
        self._extended = headers is Headers.EXTENDED
        self._form, self._magic = REQUEST, REQUEST_MAGIC
        if self._extended:
            self._form, self._magic = EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC
        self._header_bytes = self._form.size
        #: The flags of a write that asks for nothing special.
        self._write_flags = CmdFlag.PAYLOAD_LEN.value if self._extended else 0
        self._running = Running(channel, export, self._replies, memory)
        self._memory = memory
        self._early = early
        self._out_used = 0
        self._borrowed: Burst | None = None
        self.wake()

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
        finally:
            self.rest()

    # -- between bursts ------------------------------------------------------------------------

    def rest(self) -> None:
        """Lend nothing: nothing is received that has not been carried out."""
        if self._borrowed is not None:
            self._memory.give_back(self._borrowed)
            self._borrowed = None

    def wake(self) -> memoryview:
        """Have memory for the next burst; where it is received to."""
        burst = self._borrowed = self._memory.borrow()
        self._in_view = burst.requests
        self._out, self._out_view = burst.replies, burst.replies_view
        return self._in_view

    async def _receive(self) -> bool:
        """Take requests until the end; whether the client said goodbye (NBD_CMD_DISC)."""
        start, end = 0, len(self._early)
        self._in_view[:end] = self._early
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
                elif stop is _NEED_PAYLOAD:
                    start, end = await self._take_payload(start, end)
                elif stop is _SLOW_REQUEST:
                    request = parse_request(self._in_view, start, extended=self._extended)
                    assert request is not None
                    if request.type == Cmd.DISC:
                        return True
                    start, end = await self._run_slow(request, start + self._header_bytes, end)
            if start == end:
                start = end = 0
            elif len(self._in_view) - end < limits.NBD_RECEIVE_ROOM_BYTES:
                start, end = self._move_to_front(start, end)
            view, idle = self._in_view[end:], None if end else self
            spin = not self._running.count
            count = await self._channel.receive_into(view, spin=spin, idle=idle)
            if not count:
                return False
            end += count

    # -- requests that finish at once ---------------------------------------------------------

    def _burst(self, start: int, end: int) -> tuple[int, _Stop]:  # noqa: PLR0915 - calls cost
        """Run the requests in ``_in_view[start:end]`` up to the first that can't finish at once.

        Their replies are put into ``_out``. This is the hot loop: local names, no calls but
        those that do the work. Whatever is unusual, even an error, is left to ``_run_slow``.
        """
        view, out, used = self._in_view, self._out_view, self._out_used
        unpack, request_bytes, expected = self._form.unpack_from, self._header_bytes, self._magic
        node, replies, content = self._export.node, self._replies, self._out
        read_nowait, write_nowait = node.read_nowait, self._export.write_nowait
        put_done, done_bytes = replies.put_done, replies.done_bytes
        put_read, header_bytes = replies.put_read, replies.data_header_bytes
        size, room, inline = node.size_bytes, limits.NBD_SEND_BYTES, len(out) - header_bytes
        # Flags with which a write may run inline; none at all on such an export.
        usual = self._write_flags
        plain = usual if self._export.writable and not self._export.writethrough else -1
        stop = _END_OF_TURN
        monotonic = time.monotonic
        began = monotonic()
        turn_ends = began + limits.NBD_SLICE_SECONDS
        first = start
        done = writes = highest = read_bytes = 0
        try:
            for done in _BURST:  # noqa: B007 - it is looked at afterwards
                if end - start < request_bytes:
                    stop = _NEED_DATA
                    break
                magic, flags, kind, cookie, offset, length = unpack(view, start)
                data = start + request_bytes
                if magic != expected or not 0 < length <= inline or offset + length > size:
                    stop = _SLOW_REQUEST
                    break
                if used + header_bytes + length > room and used:
                    stop = _NEED_ROOM
                    break
                if kind == CMD_WRITE and flags == plain:
                    if data + length > end:
                        stop = _NEED_DATA if length <= limits.NBD_GATHER_BYTES else _NEED_PAYLOAD
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
                    used = put_read(content, used, cookie, offset, length)
                    read_bytes += length
                else:
                    stop = _SLOW_REQUEST
                    break
        except (WouldBlock, OSError):
            stop = _SLOW_REQUEST
        self._out_used = used
        # Only at the end of its turn was the last request carried out too.
        done += stop is _END_OF_TURN
        if done:
            write_bytes = start - first - done * request_bytes
            seconds = monotonic() - began
            node.inline.add(done - writes, read_bytes, writes, write_bytes, highest, seconds)
        return start, stop

    # -- all others ---------------------------------------------------------------------------

    async def _run_slow(self, request: Request, start: int, end: int) -> tuple[int, int]:
        """Run one request whose payload, if it has one, begins at ``_in_view[start]``.

        Or only receive its payload. Returns where the bytes that are to be looked at next begin
        and end.
        """
        contexts, payload = self._contexts, 0
        flagged = self._extended and request.flags & CmdFlag.PAYLOAD_LEN
        if flagged or request.type == CMD_WRITE:
            payload = request.length
        try:
            if payload and request.type == Cmd.BLOCK_STATUS:
                if payload > limits.NBD_GATHER_BYTES:
                    # It names more contexts than there are.
                    raise RequestError(errno.EINVAL, _BAD_FILTER)
                start, end = await self._fill(payload, start, end)
                request, contexts = self._filter(request, self._in_view[start : start + payload])
                start, payload = start + payload, 0
            self._export.check(request, self._headers, contexts)
        except RequestError as refusal:
            return await self._refuse(request, refusal, payload, start, end)
        if payload > limits.NBD_STREAM_BYTES:
            return await self._stream_write(request, start, end)
        if end - start < payload:
            # With its payload there, it may be one to finish at once.
            start -= self._header_bytes
            return await self._fill(self._header_bytes + payload, start, end)
        data = bytearray(self._in_view[start : start + payload])
        await self._running.start(self._nursery, request, data, contexts)
        return start + payload, end

    def _filter(self, request: Request, payload: memoryview) -> tuple[Request, list[int]]:
        """The block status that is meant, and of which contexts. Raises ``RequestError``."""
        told = parse_status_filter(payload)
        if told is not None:
            length, contexts = told
            if contexts and len({*contexts} & {*self._contexts}) == len(contexts):
                # An int: the complement of an IntFlag lacks the bits that have no name.
                flags = request.flags & ~CmdFlag.PAYLOAD_LEN.value
                return request._replace(flags=flags, length=length), contexts
        raise RequestError(errno.EINVAL, _BAD_FILTER)

    async def _refuse(
        self, request: Request, refusal: RequestError, payload: int, start: int, end: int
    ) -> tuple[int, int]:
        self._export.count_refused(request)
        if payload > limits.NBD_PAYLOAD_BYTES:
            raise ProtocolError(refusal.message) from None
        start, end = await self._skip(payload, start, end)
        await self._running.send_error(request, refusal.errno, refusal.message)
        return start, end

    async def _take_payload(self, start: int, end: int) -> tuple[int, int]:
        """Receive the payload of the plain write at ``start``, which was found to be in order.

        With all of it there, the next burst runs it; what is larger than that is written here.
        """
        length = self._form.unpack_from(self._in_view, start)[-1]
        if length <= limits.NBD_STREAM_BYTES:
            return await self._fill(self._header_bytes + length, start, end)
        request = parse_request(self._in_view, start, extended=self._extended)
        assert request is not None
        return await self._stream_write(request, start + self._header_bytes, end)

    async def _stream_write(self, request: Request, start: int, end: int) -> tuple[int, int]:
        """Write a large payload piece by piece, each while it is warm in the cache.

        Pieces end where clusters do, so that an image never has to fill one up around a piece.
        """
        offset = request.offset
        left = request.length
        failure: OSError | None = None
        doubts = self._export.node.doubts
        while left:
            count = min(left, limits.NBD_STREAM_BYTES - offset % limits.NBD_STREAM_BYTES)
            start, end = await self._fill(count, start, end)
            if failure is None:
                failure = await self._write_piece(offset, self._in_view[start : start + count])
            start += count
            offset += count
            left -= count
        if failure is None and (request.flags & CmdFlag.FUA or self._export.writethrough):
            failure = await self._flush_since(doubts)
        if failure is not None:
            await self._running.send_failure(request, failure)
        else:
            await self._running.send_done(request)
        return start, end

    async def _flush_since(self, doubts: int) -> OSError | None:
        """Flush what was written since there were so many doubts."""
        node = self._export.node
        try:
            await node.flush()
        except OSError as error:
            return error
        lost = node.doubts != doubts
        return OSError(errno.EIO, os.strerror(errno.EIO)) if lost else None

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

        What is there behind them is received with them, although some of it is moved later: the
        client then has room to send more while this is written, and there is one wait through
        the event loop less for each large write. Those cost more than moving 100 KiB.
        """
        if start == end:
            start = end = 0
        elif start + count > len(self._in_view):
            start, end = self._move_to_front(start, end)
        while end < start + count:
            end += await self._channel.receive_some_into(self._in_view[end:])
        return start, end

    def _move_to_front(self, start: int, end: int) -> tuple[int, int]:
        end -= start
        self._in_view[:end] = self._in_view[start : start + end]
        return 0, end
