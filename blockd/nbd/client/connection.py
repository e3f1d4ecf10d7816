"""Transmission, seen from the client: many requests in flight on one connection.

A task of its own receives, so that a server which waits for its replies to be taken never waits
for one of its clients that waits for a request to be taken.

Source: ``doc/proto.md``, "Transmission", "Structured reply types".
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EIO
from typing import Final

import trio

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.chunks import (
    Runs,
    is_error,
    parse_chunk,
    parse_error,
    parse_hole,
    parse_status,
)
from blockd.nbd.client.handshake import Export
from blockd.nbd.client.stream import Disconnected, Stream
from blockd.nbd.wire import Cmd, CmdFlag, Headers, ProtocolError, ReplyFlag, ReplyType, Request

#: What changes nothing at the server.
_HARMLESS: Final = frozenset({Cmd.READ, Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS})


@dataclass(slots=True, eq=False)
class _Pending:
    """A request in flight. ``into``: where a read's data goes; None: nobody wants it any more."""

    type: int
    offset: int
    length: int
    into: memoryview | None = None
    #: Bytes that a read has got.
    covered: int = 0
    error: int = 0
    status: Runs | None = None
    #: Its reply has come, or never will.
    ended: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True, eq=False)
class _Chunk:
    """A reply, or a part of one, on its way: ``received`` bytes of ``length`` have come.

    They go into ``data``; where that is None, into the request's memory, from ``at`` on.
    """

    cookie: int
    pending: _Pending
    type: int
    last: bool
    length: int = 0
    at: int = 0
    received: int = 0
    data: bytearray = field(default_factory=bytearray)

    def target(self, waste: memoryview) -> memoryview:
        """Where the next bytes go: to ``waste`` when nobody wants them any more."""
        rest = self.length - self.received
        if self.type != ReplyType.OFFSET_DATA:
            return memoryview(self.data)[self.received :]
        if self.pending.into is None:
            return waste[:rest]
        start = self.at + self.received
        return self.pending.into[start : start + rest]


class Connection:
    """One connection in transmission; once ``lost`` is set, it is of no more use."""

    def __init__(self, stream: Stream, export: Export) -> None:
        self.export = export
        self.lost: Exception | None = None
        self.lost_at = float("inf")
        self._stream = stream
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0
        self._slice_ends = 0.0
        self._waste = memoryview(bytearray(limits.NBD_CLIENT_WASTE_BYTES))

    def close(self) -> None:
        """Hang up; whoever waits gets ``ConnectionError``."""
        self._lose(Disconnected("closed"))

    async def disconnect(self) -> None:
        """Say that no more requests follow, and hang up."""
        if self.lost is None:
            # The server may have gone, unheard of until now.
            with trio.move_on_after(limits.NBD_CLIENT_DISCONNECT_SECONDS), suppress(Disconnected):
                await self._send(self._header(0, _Pending(Cmd.DISC, 0, 0), 0))
        self.close()

    async def read(self, offset: int, view: memoryview) -> None:
        """Raises ``ConnectionError`` where the connection is lost, else ``OSError``."""
        await self._request(_Pending(Cmd.READ, offset, len(view), view))

    async def write(self, offset: int, view: memoryview) -> None:
        """As ``read``; ``view`` must not change until this returns."""
        # "Request flags": always with extended headers.
        flags = CmdFlag.PAYLOAD_LEN if self.export.extended else 0
        await self._request(_Pending(Cmd.WRITE, offset, len(view)), flags=flags, payload=view)

    async def change(self, command: Cmd, offset: int, length: int, flags: int = 0) -> None:
        """A request without data: TRIM, WRITE_ZEROES, CACHE or FLUSH."""
        await self._request(_Pending(command, offset, length), flags=flags)

    async def block_status(self, offset: int, length: int) -> Runs:
        """What the meta context says of the range from its beginning on, maybe beyond its end."""
        pending = _Pending(Cmd.BLOCK_STATUS, offset, length)
        await self._request(pending)
        if pending.status is None:
            raise OSError(EIO, "the server told no block status")
        return pending.status

    # -- asking --------------------------------------------------------------------------------

    async def _request(
        self, pending: _Pending, *, flags: int = 0, payload: bytes | memoryview = b""
    ) -> None:
        if self.lost is not None:
            raise Disconnected("the connection is lost")
        self._cookie += 1
        cookie = self._cookie
        self._pending[cookie] = pending
        try:
            await self._send(self._header(flags, pending, cookie), payload)
        except trio.Cancelled:
            # No reply will come: it waited for its turn, or was cut off and the connection with it.
            del self._pending[cookie]
            raise
        try:
            await pending.ended.wait()
        except trio.Cancelled:
            if pending.type not in _HARMLESS:
                await self._let_end(pending)
            raise
        finally:
            # Its reply may still come, but nothing of it may go into the caller's memory.
            pending.into = None
        if cookie in self._pending:
            raise Disconnected("the connection is lost")
        if pending.error:
            number = wire.os_errno_of(pending.error)
            raise OSError(number, os.strerror(number))

    async def _let_end(self, pending: _Pending) -> None:
        """Wait for a change, which the server may make at any time until it has replied.

        To whoever asked for it, it would be over: nothing would keep a backup from taking what
        it overwrites for the content of the range.
        """
        with trio.CancelScope(shield=True), trio.move_on_after(limits.NBD_CLIENT_CHANGE_SECONDS):
            await pending.ended.wait()
        if not pending.ended.is_set():
            self.close()

    def _header(self, flags: int, pending: _Pending, cookie: int) -> bytes:
        request = Request(flags, pending.type, cookie, pending.offset, pending.length)
        return wire.request_header(request, extended=self.export.extended)

    async def _send(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        try:
            await self._stream.send(header, payload)
        except (OSError, trio.ClosedResourceError) as error:
            self._lose(error)
            raise Disconnected("the connection is lost") from error

    # -- receiving -----------------------------------------------------------------------------

    async def receive(self) -> None:
        """Receive replies until the connection is lost."""
        try:
            while True:
                chunk = await self._receive_header()
                await self._receive_payload(chunk)
                self._end_chunk(chunk)
                await self._end_turn_if_over()
        except (OSError, ProtocolError, struct.error, trio.ClosedResourceError) as error:
            self._lose(error)
        finally:
            self.close()

    async def _receive_header(self) -> _Chunk:
        (magic,) = wire.U32.unpack(await self._stream.fill(wire.U32.size))
        headers = self.export.headers
        if magic != wire.SIMPLE_REPLY_MAGIC and headers is not Headers.SIMPLE:
            return await self._receive_chunk_header()
        if magic != wire.SIMPLE_REPLY_MAGIC or headers is Headers.EXTENDED:
            raise ProtocolError(f"bad reply magic 0x{magic:08x}")
        header = await self._stream.take(wire.SIMPLE_REPLY.size)
        _, error, cookie = wire.SIMPLE_REPLY.unpack(header)
        pending = self._find(cookie)
        pending.error = error
        if error or pending.type != Cmd.READ:
            return _Chunk(cookie, pending, ReplyType.NONE, last=True)
        self._cover(pending, pending.offset, pending.length)
        return _Chunk(cookie, pending, ReplyType.OFFSET_DATA, last=True, length=pending.length)

    async def _receive_chunk_header(self) -> _Chunk:
        extended = self.export.extended
        form = wire.EXTENDED_HEADER if extended else wire.STRUCTURED_HEADER
        head = parse_chunk(await self._stream.take(form.size), extended=extended)
        cookie, kind, length = head.cookie, head.type, head.length
        pending = self._find(cookie)
        last = bool(head.flags & ReplyFlag.DONE)
        if head.offset not in (None, pending.offset):
            raise ProtocolError(f"a reply for {head.offset} to a request for {pending.offset}")
        if kind != ReplyType.OFFSET_DATA:
            if length > limits.NBD_CLIENT_CHUNK_BYTES:
                raise ProtocolError(f"a reply chunk of {length} bytes is too long")
            return _Chunk(cookie, pending, kind, last=last, length=length, data=bytearray(length))
        (offset,) = wire.OFFSET.unpack(await self._stream.take(wire.OFFSET.size))
        length -= wire.OFFSET.size
        self._cover(pending, offset, length)
        at = offset - pending.offset
        return _Chunk(cookie, pending, kind, last=last, length=length, at=at)

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError(f"a reply to no request: cookie {cookie}")
        return pending

    @staticmethod
    def _cover(pending: _Pending, offset: int, length: int) -> None:
        """Count a part of a read's data, which nothing but a part may bring, and only once."""
        within = pending.offset <= offset and offset + length <= pending.offset + pending.length
        if pending.type != Cmd.READ or length <= 0 or not within:
            raise ProtocolError("a reply with data that were not asked for")
        pending.covered += length
        if pending.covered > pending.length:
            raise ProtocolError("a reply with more data than were asked for")

    async def _receive_payload(self, chunk: _Chunk) -> None:
        while chunk.received < chunk.length:
            # Asked for anew after each wait: meanwhile the request's caller may have gone.
            count = self._stream.take_some_into(chunk.target(self._waste))
            chunk.received += count
            if not count:
                await self._stream.wait_some()
            else:
                await self._end_turn_if_over()

    async def _end_turn_if_over(self) -> None:
        """Let others have theirs, even if the server always has more to say."""
        if time.monotonic() > self._slice_ends:
            await trio.lowlevel.checkpoint()
            self._slice_ends = time.monotonic() + limits.NBD_SLICE_SECONDS

    def _end_chunk(self, chunk: _Chunk) -> None:
        pending = chunk.pending
        match chunk.type:
            case ReplyType.NONE | ReplyType.OFFSET_DATA:
                pass
            case ReplyType.OFFSET_HOLE:
                self._end_hole(pending, memoryview(chunk.data))
            case ReplyType.BLOCK_STATUS | ReplyType.BLOCK_STATUS_EXT:
                self._end_status(pending, chunk)
            case kind if is_error(kind):
                pending.error, _ = parse_error(memoryview(chunk.data))
            case kind:
                raise ProtocolError(f"an unknown reply chunk: {kind}")
        if chunk.last:
            self._end(chunk.cookie, pending)

    def _end_hole(self, pending: _Pending, data: memoryview) -> None:
        offset, length = parse_hole(data)
        self._cover(pending, offset, length)
        if pending.into is not None:
            at = offset - pending.offset
            pending.into[at : at + length] = bytes(length)

    def _end_status(self, pending: _Pending, chunk: _Chunk) -> None:
        """One chunk for the one context that was negotiated: a second could go on for ever."""
        context, runs = parse_status(
            memoryview(chunk.data), extended=chunk.type == ReplyType.BLOCK_STATUS_EXT
        )
        wanted = pending.type == Cmd.BLOCK_STATUS and context == self.export.context_id
        if not wanted or pending.status is not None:
            raise ProtocolError("a block status that was not asked for")
        pending.status = runs

    def _end(self, cookie: int, pending: _Pending) -> None:
        if pending.type == Cmd.READ and not pending.error and pending.covered < pending.length:
            raise ProtocolError("a reply without all the data")
        del self._pending[cookie]
        pending.ended.set()

    def _lose(self, error: Exception) -> None:
        if self.lost is None:
            self.lost = error
            self.lost_at = trio.current_time()
            self._stream.close()
            for pending in self._pending.values():
                pending.ended.set()
