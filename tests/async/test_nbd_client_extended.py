"""The NBD client with extended headers, against a server that the test plays."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from blockd.nbd import wire
from blockd.nbd.chunks import Runs, chunk, error_reply, hole, status
from blockd.nbd.client.connection import Connection
from blockd.nbd.client.handshake import Export
from blockd.nbd.client.stream import Stream
from blockd.nbd.wire import Cmd, CmdFlag, Headers, ReplyType, Request, TransmissionFlag

SIZE = 1 << 40
EXPORT = Export(SIZE, TransmissionFlag.HAS_FLAGS, Headers.EXTENDED, context_id=7)


async def receive(server: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += await server.receive_some(count - len(data))
    return data


async def request(server: trio.SocketStream) -> Request:
    head = await receive(server, wire.EXTENDED_REQUEST.size)
    found = wire.parse_request(head, extended=True)
    assert found is not None
    return found


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Connection, trio.SocketStream, trio.Nursery]]:
    """The last: for requests, which all end before the connection does."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(Stream(ours), EXPORT)
    server = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(connection.receive)
        async with trio.open_nursery() as requests:
            yield connection, server, requests
        connection.close()


async def test_a_read_in_pieces() -> None:
    view = memoryview(bytearray(b"?" * 1024))
    async with connected() as (connection, server, requests):
        requests.start_soon(connection.read, 1 << 39, view)
        asked = await request(server)
        assert asked._replace(cookie=0) == Request(0, Cmd.READ, 0, 1 << 39, 1024)
        data = wire.OFFSET.pack(asked.offset + 512) + b"d" * 512
        for kind, payload in (
            (ReplyType.OFFSET_DATA, data),
            (ReplyType.OFFSET_HOLE, hole(asked.offset, 512)),
        ):
            await server.send_all(chunk(asked, kind, payload, extended=True, done=False))
        await server.send_all(chunk(asked, ReplyType.NONE, extended=True))
    assert view == bytes(512) + b"d" * 512


async def test_a_write_says_that_a_payload_follows() -> None:
    async with connected() as (connection, server, requests):
        requests.start_soon(connection.write, 512, memoryview(b"x" * 512))
        asked = await request(server)
        assert asked._replace(cookie=0) == Request(CmdFlag.PAYLOAD_LEN, Cmd.WRITE, 0, 512, 512)
        assert await receive(server, 512) == b"x" * 512
        await server.send_all(chunk(asked, ReplyType.NONE, extended=True))


async def test_lengths_of_more_than_32_bits() -> None:
    told: list[Runs] = []

    async def ask(connection: Connection) -> None:
        told.append(await connection.block_status(0, SIZE))

    async with connected() as (connection, server, requests):
        requests.start_soon(connection.change, Cmd.WRITE_ZEROES, 0, SIZE)
        asked = await request(server)
        assert asked.length == SIZE
        await server.send_all(chunk(asked, ReplyType.NONE, extended=True))
        requests.start_soon(ask, connection)
        asked = await request(server)
        assert asked.length == SIZE
        payload = status(7, Runs([SIZE], [3]), extended=True)
        await server.send_all(chunk(asked, ReplyType.BLOCK_STATUS_EXT, payload, extended=True))
    assert [(list(runs.lengths), list(runs.flags)) for runs in told] == [([SIZE], [3])]


async def test_an_error() -> None:
    async def flush(connection: Connection) -> None:
        with pytest.raises(OSError, match="No space"):
            await connection.change(Cmd.FLUSH, 0, 0)

    async with connected() as (connection, server, requests):
        requests.start_soon(flush, connection)
        asked = await request(server)
        await server.send_all(error_reply(asked, 28, "full", Headers.EXTENDED))


@pytest.mark.parametrize("which", ["simple", "structured", "another offset"])
async def test_replies_of_other_forms_end_the_connection(which: str) -> None:
    async def flush(connection: Connection) -> None:
        with pytest.raises(ConnectionError):
            await connection.change(Cmd.FLUSH, 0, 0)

    async with connected() as (connection, server, requests):
        requests.start_soon(flush, connection)
        asked = await request(server)
        await server.send_all(
            {
                "simple": wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, asked.cookie),
                "structured": chunk(asked, ReplyType.NONE, extended=False) + bytes(12),
                "another offset": chunk(asked._replace(offset=1), ReplyType.NONE, extended=True),
            }[which]
        )
