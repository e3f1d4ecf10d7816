"""The NBD client against a server that the test plays, byte by byte."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd.nbd import wire
from blockd.nbd.chunks import Runs, error_reply, status
from blockd.nbd.client.connection import Connection
from blockd.nbd.client.handshake import Export
from blockd.nbd.client.stream import Stream
from blockd.nbd.wire import Cmd, Errno, Headers, ReplyType, TransmissionFlag
from tests.helpers.turns import counted_turns

SIZE = 1024 * 1024
EXPORT = Export(SIZE, TransmissionFlag.HAS_FLAGS, Headers.STRUCTURED, context_id=7)
DATA = bytes(range(256)) * 16
RUNS = Runs([65536, 65536], [0, 3])


class Server:
    """The other end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)

    async def request(self) -> wire.Request:
        """The next request's header."""
        data = b""
        while len(data) < wire.REQUEST.size:
            data += await self.sock.recv(wire.REQUEST.size - len(data))
        request = wire.parse_request(data)
        assert request is not None
        return request

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[await self.sock.send(view) :]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Connection, Server]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(Stream(ours), EXPORT)
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.receive)
            yield connection, Server(theirs)
            connection.close()


def chunk(cookie: int, kind: int, payload: bytes, *, done: bool = True) -> bytes:
    header = wire.STRUCTURED_HEADER.pack(
        wire.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(payload)
    )
    return header + payload


def data_chunk(request: wire.Request, at: int, data: bytes, *, done: bool = False) -> bytes:
    payload = wire.OFFSET.pack(request.offset + at) + data
    return chunk(request.cookie, ReplyType.OFFSET_DATA, payload, done=done)


def hole_chunk(request: wire.Request, at: int, length: int) -> bytes:
    payload = wire.OFFSET.pack(request.offset + at) + wire.U32.pack(length)
    return chunk(request.cookie, ReplyType.OFFSET_HOLE, payload, done=False)


async def test_a_reply_in_pieces_out_of_order() -> None:
    view = memoryview(bytearray(b"?" * 4096))
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        nursery.start_soon(connection.read, 8192, view)
        request = await server.request()
        assert request[:2] == (0, Cmd.READ)
        assert request[3:] == (8192, 4096)
        await server.send(
            data_chunk(request, 2048, DATA[2048:]),
            hole_chunk(request, 512, 1536),
            data_chunk(request, 0, DATA[:512]),
            chunk(request.cookie, ReplyType.NONE, b""),
        )
    assert view == DATA[:512] + bytes(1536) + DATA[2048:]


async def test_replies_in_any_order_each_byte_by_itself() -> None:
    first, second = (memoryview(bytearray(512)) for _ in range(2))
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        nursery.start_soon(connection.read, 0, first)
        one = await server.request()
        nursery.start_soon(connection.read, 512, second)
        two = await server.request()
        for byte in data_chunk(two, 0, b"2" * 512, done=True):
            await server.send(bytes([byte]))
            await wait_all_tasks_blocked()
        await server.send(data_chunk(one, 0, b"1" * 512, done=True))
    assert first == b"1" * 512
    assert second == b"2" * 512


@pytest.mark.parametrize("simple", [True, False])
async def test_an_error_is_the_requests_own(*, simple: bool) -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(OSError, match="No space") as raised:
                await connection.read(0, memoryview(bytearray(512)))
            assert raised.value.errno == errno.ENOSPC

        nursery.start_soon(read)
        request = await server.request()
        headers = Headers.SIMPLE if simple else Headers.STRUCTURED
        reply = error_reply(request, errno.ENOSPC, "full", headers)
        await server.send(reply)
        await wait_all_tasks_blocked()
        assert connection.lost is None


@pytest.mark.parametrize("number", [2, 4, 11, 104, 4242, (1 << 32) - 1])
async def test_an_error_that_nbd_does_not_have_is_an_invalid_argument(number: int) -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(OSError, match="Invalid argument") as raised:
                await connection.read(0, memoryview(bytearray(512)))
            assert raised.value.errno == errno.EINVAL

        nursery.start_soon(read)
        request = await server.request()
        await server.send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, number, request.cookie))


async def test_a_server_that_always_has_more_to_say_lets_others_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here one error after the other for the same request."""

    async def read() -> None:
        with pytest.raises(OSError, match="Input/output"):
            await connection.read(0, memoryview(bytearray(512)))

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(Stream(ours), EXPORT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        error = chunk(1, ReplyType.ERROR, wire.ERROR_PAYLOAD.pack(Errno.EIO, 0), done=False)
        theirs.sendall(error * 100 + chunk(1, ReplyType.NONE, b""))
        theirs.close()
        async with counted_turns(monkeypatch) as turns:
            await connection.receive()
            assert 10 <= turns() <= 50


def wrong_replies(request: wire.Request) -> dict[str, bytes]:
    """What a server must not answer to a read."""
    cookie, inside = request.cookie, wire.OFFSET.pack(request.offset)
    return {
        "no magic": b"x" * 20,
        "no request": chunk(cookie + 1, ReplyType.NONE, b""),
        "an unknown chunk": chunk(cookie, 77, b""),
        "no data": chunk(cookie, ReplyType.NONE, b""),
        "data before": data_chunk(request, -1, b"x"),
        "data behind": data_chunk(request, request.length, b"x"),
        "too much data": chunk(cookie, ReplyType.OFFSET_DATA, inside + bytes(513)),
        "empty data": chunk(cookie, ReplyType.OFFSET_DATA, inside),
        "a hole behind": hole_chunk(request, 1, request.length),
        "half a hole": chunk(cookie, ReplyType.OFFSET_HOLE, b"xx"),
        "an error that is none": chunk(cookie, ReplyType.ERROR, wire.ERROR_PAYLOAD.pack(0, 0)),
        "half an error": chunk(cookie, ReplyType.ERROR, b"x"),
        "too long": wire.STRUCTURED_HEADER.pack(
            wire.STRUCTURED_REPLY_MAGIC, 0, ReplyType.ERROR, cookie, 1 << 31
        ),
        "more data than asked for": data_chunk(request, 0, bytes(300)) * 2,
        "a block status": chunk(cookie, ReplyType.BLOCK_STATUS, status(7, RUNS, extended=False)),
        "the end": b"",
    }


@pytest.mark.parametrize("which", wrong_replies(wire.Request(0, 0, 1, 512, 512)))
async def test_nonsense_ends_the_connection_and_fails_what_waits(which: str) -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:

        async def read(offset: int) -> None:
            with pytest.raises(ConnectionError):
                await connection.read(offset, memoryview(bytearray(512)))

        nursery.start_soon(read, 512)
        request = await server.request()
        nursery.start_soon(read, 4096)
        await server.request()
        await server.send(wrong_replies(request)[which])
        server.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        await connection.write(0, memoryview(b"x"))


async def test_a_cancelled_reads_memory_is_left_alone() -> None:
    view = memoryview(bytearray(b"?" * 4096))
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await connection.read(0, view)

        nursery.start_soon(read)
        request = await server.request()
        reply = data_chunk(request, 0, DATA, done=True)
        await server.send(reply[:2000])
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        before = bytes(view)
        await server.send(reply[2000:])
        await wait_all_tasks_blocked()
        assert view == before
        other = memoryview(bytearray(512))
        nursery.start_soon(connection.read, 0, other)
        await server.send(data_chunk(await server.request(), 0, DATA[:512], done=True))
    assert other == DATA[:512]


async def test_a_request_cut_off_in_the_middle_ends_the_connection() -> None:
    async with connected() as (connection, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.write, 0, memoryview(bytes(SIZE)))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert connection.lost is not None
        assert (await server.request()).type == Cmd.WRITE


async def test_a_cancelled_change_ends_before_its_caller() -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        scope, ended = trio.CancelScope(), trio.Event()

        async def write() -> None:
            with scope:
                await connection.write(0, memoryview(DATA))
            ended.set()

        nursery.start_soon(write)
        request = await server.request()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        await server.send(chunk(request.cookie, ReplyType.NONE, b""))
        await ended.wait()
        assert connection.lost is None


async def test_a_cancelled_change_that_is_never_answered_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        nursery.start_soon(connection.change, Cmd.TRIM, 0, 512)
        await server.request()
        nursery.cancel_scope.cancel()
    assert connection.lost is not None


async def test_a_request_that_is_cancelled_before_its_turn_is_forgotten() -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await connection.read(0, memoryview(bytearray(512)))

        async def write() -> None:
            with pytest.raises(ConnectionError):
                await connection.write(0, memoryview(bytes(SIZE)))

        nursery.start_soon(write)
        request = await server.request()
        await wait_all_tasks_blocked()
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert connection.lost is None
        await server.send(chunk(request.cookie + 1, ReplyType.NONE, b""))
        await wait_all_tasks_blocked()
        assert "no request" in str(connection.lost)


async def test_goodbye_to_a_server_that_has_gone() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.close()
    connection = Connection(Stream(ours), EXPORT)
    await connection.disconnect()
    assert connection.lost is not None


async def test_block_status() -> None:
    async with connected() as (connection, server), trio.open_nursery() as nursery:
        told: list[Runs] = []

        async def ask() -> None:
            told.append(await connection.block_status(0, SIZE))

        nursery.start_soon(ask)
        request = await server.request()
        payload = status(7, RUNS, extended=False)
        await server.send(chunk(request.cookie, ReplyType.BLOCK_STATUS, payload))
    assert [(list(runs.lengths), list(runs.flags)) for runs in told] == [RUNS]


@pytest.mark.parametrize(
    "payloads",
    [
        [status(7, RUNS, extended=False)] * 2,
        [status(8, RUNS, extended=False)],
        [b"xxxx"],
        [status(7, Runs([0], [0]), extended=False)],
        [],
    ],
    ids=["twice", "of another context", "without runs", "of nothing", "none"],
)
async def test_a_wrong_block_status(payloads: list[bytes]) -> None:
    """It can't go on for ever, nor tell of what was not asked for."""
    async with connected() as (connection, server), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(OSError, match=r"lost|no block status"):
                await connection.block_status(0, SIZE)

        nursery.start_soon(ask)
        cookie = (await server.request()).cookie
        pieces = [chunk(cookie, ReplyType.BLOCK_STATUS, each, done=False) for each in payloads]
        await server.send(b"".join(pieces) + chunk(cookie, ReplyType.NONE, b""))


def test_errors_are_numbers_of_this_host() -> None:
    assert all(Errno[name] == getattr(errno, name) for name in Errno.__members__)
