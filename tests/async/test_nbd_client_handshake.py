"""The NBD client's haggling, with a server that the test plays."""

from __future__ import annotations

import socket

import pytest
import trio

from blockd.nbd import wire
from blockd.nbd.client.handshake import Export, negotiate
from blockd.nbd.client.stream import Stream
from blockd.nbd.options import meta_context
from blockd.nbd.wire import Headers, Info, Option, ProtocolError, Rep

SIZE = 1 << 20
FLAGS = 0x16D


class Haggler:
    """A server that refuses what is not in ``answers``: replies to each option, without the ACK."""

    def __init__(self, sock: socket.socket, answers: dict[int, list[tuple[Rep, bytes]]]) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._answers = answers
        #: Options as they came.
        self.asked: list[int] = []

    async def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := await self._stream.receive_some(count - len(data))):
            data += piece
        return data

    async def serve(self) -> None:
        async with self._stream:
            greeting = wire.GREETING.pack(wire.INIT_PASSWD, wire.OPTION_MAGIC, 3)
            await self._stream.send_all(greeting)
            await self._receive(wire.CLIENT_FLAGS.size)
            while header := await self._receive(wire.OPTION_HEADER.size):
                _, option, length = wire.OPTION_HEADER.unpack(header)
                await self._receive(length)
                self.asked.append(option)
                if not await self._answer(option):
                    return

    async def _answer(self, option: int) -> bool:
        """Whether there may be more options."""
        if option == Option.EXPORT_NAME:
            await self._stream.send_all(wire.EXPORT_NAME_REPLY.pack(SIZE, FLAGS))
            return False
        known = option in self._answers
        end = (Rep.ACK, b"") if known else (Rep.ERR_UNSUP, b"no")
        replies = [*self._answers.get(option, []), end]
        try:
            for kind, data in replies:
                await self._stream.send_all(wire.option_reply(option, kind, data))
        except trio.BrokenResourceError:
            return False
        return not known or option != Option.GO


async def haggle(answers: dict[int, list[tuple[Rep, bytes]]]) -> tuple[Export, list[int]]:
    """What the client has made of it, and what it asked for. Raises ``ProtocolError``."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream, server = Stream(ours), Haggler(theirs, answers)
    found: Export | ProtocolError
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        try:
            found = await negotiate(stream, "disk")
        except ProtocolError as error:
            found = error
        stream.close()
    if isinstance(found, ProtocolError):
        raise found
    return found, server.asked


CONTEXT = (Rep.META_CONTEXT, meta_context(7, "base:allocation"))
EXPORT = (Rep.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, SIZE, FLAGS))
BLOCKS = (Rep.INFO, wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 512, 65536, 100_000))


async def test_the_best_that_there_is_is_taken() -> None:
    export, asked = await haggle(
        {
            Option.EXTENDED_HEADERS: [],
            Option.SET_META_CONTEXT: [CONTEXT],
            Option.GO: [BLOCKS, EXPORT],
        }
    )
    assert asked == [Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT, Option.GO]
    assert (export.headers, export.context_id) == (Headers.EXTENDED, 7)
    # The longest request ends where a preferred block does.
    assert (export.minimum_bytes, export.maximum_bytes) == (512, 65536)


async def test_the_old_way_in_keeps_what_was_agreed_on() -> None:
    export, asked = await haggle({Option.STRUCTURED_REPLY: [], Option.SET_META_CONTEXT: [CONTEXT]})
    assert asked[-2:] == [Option.GO, Option.EXPORT_NAME]
    assert (export.size_bytes, export.headers, export.context_id) == (SIZE, Headers.STRUCTURED, 7)


@pytest.mark.parametrize(
    ("option", "replies", "message"),
    [
        (Option.SET_META_CONTEXT, [CONTEXT] * 5000, "too long"),
        (Option.SET_META_CONTEXT, [(Rep.SERVER, b"")], "Unexpected reply"),
        (Option.SET_META_CONTEXT, [(Rep.META_CONTEXT, b"xx")], "meta context in 2 bytes"),
        (Option.GO, [(Rep.INFO, bytes(60_000))] * 2, "too long"),
        (Option.GO, [BLOCKS], "did not tell the export's size"),
        (Option.GO, [EXPORT, (Rep.INFO, b"x")], "Unexpected reply"),
    ],
)
async def test_a_server_that_haggles_wrongly_is_left(
    option: Option, replies: list[tuple[Rep, bytes]], message: str
) -> None:
    answers: dict[int, list[tuple[Rep, bytes]]] = {Option.STRUCTURED_REPLY: []}
    answers |= {Option.SET_META_CONTEXT: [CONTEXT], option: replies}
    with pytest.raises(ProtocolError, match=message):
        await haggle(answers)
