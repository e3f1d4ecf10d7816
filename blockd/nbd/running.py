"""The requests of one connection that can't finish at once: each runs in a task of its own."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

import trio

from blockd import limits
from blockd.errors import WouldBlock
from blockd.nbd import chunks
from blockd.nbd.channel import Channel
from blockd.nbd.content import Content
from blockd.nbd.export import Export
from blockd.nbd.memory import Memory
from blockd.nbd.replies import SimpleReplies
from blockd.nbd.wire import CMD_READ, CMD_WRITE, Cmd, CmdFlag, Headers, ReplyType, Request


class Running:
    """Runs checked requests and sends their replies."""

    def __init__(
        self, channel: Channel, export: Export, replies: SimpleReplies, memory: Memory
    ) -> None:
        self._channel = channel
        self._export = export
        self._memory = memory
        self._replies = replies
        self._extended = replies.headers is Headers.EXTENDED
        self._bytes = 0
        self._one_ended = trio.Event()
        #: The node's, as far as the client has heard of them.
        self._doubts = export.node.doubts
        #: How many run now.
        self.count = 0

    async def start(
        self,
        nursery: trio.Nursery,
        request: Request,
        data: bytearray,
        contexts: Sequence[int],
    ) -> None:
        """Run ``request`` in ``nursery``, once there is room for one more.

        ``contexts``: of which a block status is to tell.
        """
        weight = _weight(request)
        while self.count >= limits.NBD_REQUESTS_IN_FLIGHT or (
            self.count and self._bytes + weight > limits.NBD_BYTES_IN_FLIGHT
        ):
            await self._one_ended.wait()
        await self._memory.reserve(weight, first=not self.count)
        self.count += 1
        self._bytes += weight
        nursery.start_soon(self._run, request, data, contexts)

    async def _run(self, request: Request, payload: bytearray, contexts: Sequence[int]) -> None:
        try:
            if request.type == Cmd.BLOCK_STATUS:
                await self._block_status(request, contexts)
            else:
                await self._run_other(request, payload)
        finally:
            self.count -= 1
            self._bytes -= _weight(request)
            self._memory.release(_weight(request))
            self._one_ended.set()
            self._one_ended = trio.Event()

    async def _run_other(self, request: Request, payload: bytearray) -> None:
        try:
            if request.type == CMD_READ and request.length:
                reply = await self._read(request)
            elif request.type == Cmd.CACHE:
                await self._cache(request)
                reply = [self._done(request)]
            else:
                await self._export.run(request, memoryview(payload))
                if request.type == Cmd.FLUSH:
                    self._tell_doubts()
                reply = [self._done(request)]
        except OSError as error:
            await self.send_failure(request, error)
        else:
            await self._channel.send(*reply)

    def _tell_doubts(self) -> None:
        """Fail a flush where writes before it may be lost: once, to each client.

        A client would take a success for a promise that all it has written is on the disk.
        """
        told, self._doubts = self._doubts, self._export.node.doubts
        if self._doubts > told:
            raise OSError(errno.EIO, "storage was away, and may have lost what was not flushed")

    # -- reading -----------------------------------------------------------------------------

    async def _read(self, request: Request) -> list[memoryview]:
        """Run a READ; its whole reply, in parts.

        One part would do, but to clear the memory for the largest would stop the loop for 40 ms.
        """
        content = Content(request, self._replies)
        for at in range(0, request.length, limits.NBD_READ_PIECE_BYTES):
            piece = bytearray(min(request.length - at, limits.NBD_READ_PIECE_BYTES))
            if len(piece) < request.length:
                await self._read_piece(request.offset + at, memoryview(piece))
            else:
                # A small one was tried at once before.
                await self._export.node.read(request.offset + at, memoryview(piece))
            content.add(piece)
        return content.reply()

    async def _cache(self, request: Request) -> None:
        """Read, so that what lies below has it at hand, or has its copy of it."""
        piece = memoryview(bytearray(min(request.length, limits.NBD_READ_PIECE_BYTES)))
        for at in range(0, request.length, limits.NBD_READ_PIECE_BYTES):
            await self._read_piece(request.offset + at, piece[: request.length - at])

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

    # -- block status ------------------------------------------------------------------------

    async def _block_status(self, request: Request, contexts: Sequence[int]) -> None:
        """One chunk for each context, sent as soon as it is made: all may take much memory."""
        kind = ReplyType.BLOCK_STATUS_EXT if self._extended else ReplyType.BLOCK_STATUS
        for number in contexts:
            try:
                payload = await self._status(request, number)
            except OSError as error:
                code = error.errno or errno.EIO
                await self.send_error(request, code, "can't get block status")
                return
            done = number == contexts[-1]
            chunk = chunks.chunk(request, kind, payload, extended=self._extended, done=done)
            await self._channel.send(memoryview(chunk))

    async def _status(self, request: Request, number: int) -> bytes:
        _, _, _, offset, length = request
        one = bool(request.flags & CmdFlag.REQ_ONE)
        pause = self._channel.end_turn_if_over
        extended = self._extended
        runs = await self._export.contexts.runs(
            number, offset, length, one=one, extended=extended, pause=pause
        )
        await pause()
        return chunks.status(number, runs, extended=extended)

    # -- replies -----------------------------------------------------------------------------

    def _done(self, request: Request) -> memoryview:
        """The reply to a request that succeeded and has no data to return."""
        replies = self._replies
        size, put = replies.done_bytes, replies.put_done
        if request.type == CMD_READ:
            size, put = replies.empty_read_bytes, replies.put_empty_read
        reply = memoryview(bytearray(size))
        put(reply, 0, request.cookie, request.offset)
        return reply

    async def send_done(self, request: Request) -> None:
        """Say that it has succeeded, and has no data to return."""
        await self._channel.send_burst(self._done(request))

    async def send_failure(self, request: Request, error: OSError) -> None:
        """Say that it has failed."""
        number = error.errno or errno.EIO
        await self.send_error(request, number, os.strerror(number))

    async def send_error(self, request: Request, number: int, message: str) -> None:
        """Say that it has failed or is refused, and why."""
        reply = chunks.error_reply(request, number, message, self._replies.headers)
        await self._channel.send(memoryview(reply))


def _weight(request: Request) -> int:
    """The memory that a request takes, in bytes."""
    if request.type in (CMD_READ, CMD_WRITE):
        return request.length
    if request.type == Cmd.CACHE:
        return min(request.length, limits.NBD_READ_PIECE_BYTES)
    return limits.NBD_STATUS_BYTES if request.type == Cmd.BLOCK_STATUS else 0
