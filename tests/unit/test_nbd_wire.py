"""Requests and replies: one table for both ends, in pieces of every size, and damaged."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.chunks import chunk, error_reply
from blockd.nbd.wire import Cmd, Errno, Headers, ProtocolError, Rep, ReplyType, Request
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError, request_bytes
from tests.helpers.nbd_handshake import GREETING
from tests.helpers.vectors import named

# --- requests --------------------------------------------------------------------------------


def request_of(vector: dict[str, Any]) -> tuple[str, Call, Request]:
    fields = [vector[name] for name in ("flags", "type", "cookie", "offset", "length")]
    data = bytes.fromhex(vector.get("data", ""))
    flags, kind, _, offset, length = fields
    call = Call(kind, offset, 0 if data else length, flags, data)
    return vector["hex"], call, Request(*fields)


REQUESTS = {
    name: request_of(vector) for name, vector in named("nbd/requests.json", "requests").items()
}

each_request = pytest.mark.parametrize(
    ("text", "call", "request_"), REQUESTS.values(), ids=REQUESTS.keys()
)


@each_request
def test_a_client_encodes_requests(text: str, call: Call, request_: Request) -> None:
    assert request_bytes(call, request_.cookie) == bytes.fromhex(text)


@each_request
def test_requests_are_parsed(text: str, call: Call, request_: Request) -> None:
    data = bytes.fromhex(text)
    assert wire.parse_request(data) == request_
    assert wire.request_header(request_) == data[: wire.REQUEST.size]
    assert wire.parse_request(memoryview(data + b"trailing")) == request_
    assert wire.parse_request(bytearray(b"before" + data), 6) == request_
    for size in range(wire.REQUEST.size):
        assert wire.parse_request(data[:size]) is None
        assert wire.parse_request(data + data[:size], len(data)) is None


@each_request
def test_a_wrong_magic_is_no_request(text: str, call: Call, request_: Request) -> None:
    data = bytearray.fromhex(text)
    for bit in range(32):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="bad request magic 0x"):
            wire.parse_request(data)
        data[bit // 8] ^= 1 << bit % 8


@given(st.binary(max_size=64), st.integers(0, 64))
def test_anything_is_a_request_or_none_or_an_error(data: bytes, position: int) -> None:
    try:
        request = wire.parse_request(data, position)
    except ProtocolError:
        return
    if request is not None:
        start = position + wire.REQUEST.size
        assert wire.REQUEST.pack(wire.REQUEST_MAGIC, *request) == data[position:start]


# --- replies ---------------------------------------------------------------------------------

#: A READ's data, or an error.
Result: TypeAlias = bytes | tuple[Errno | Rep, str]

PAST_THE_END = "operation past EOF; From: 1048576, Len: 1, Size: 1048576"


@dataclass
class Exchange:
    """``call``, the server's reply as text and as our server makes it, what the client sees."""

    call: Call
    text: str
    made: bytes
    result: Result

    @property
    def structured(self) -> bool:
        return self.text.startswith("668e33ef")


def simple(error: int = 0) -> bytes:
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, 1)


def offset_data(offset: int, data: bytes, flags: int = wire.DONE) -> bytes:
    length = len(data) + 8
    fields = (wire.STRUCTURED_REPLY_MAGIC, flags, wire.OFFSET_DATA, 1, length, offset)
    return wire.OFFSET_DATA_HEADER.pack(*fields) + data


def offset_hole(offset: int, length: int, flags: int = wire.DONE) -> bytes:
    kind = wire.ReplyType.OFFSET_HOLE
    return struct.pack(">IHHQIQI", wire.STRUCTURED_REPLY_MAGIC, flags, kind, 1, 12, offset, length)


READ = Call(Cmd.READ, 0x1000, 4)
ASKED = Request(0, Cmd.READ, 1, 0x1000, 4)
NONE = chunk(ASKED, ReplyType.NONE, extended=False)

#: Each published reply as our server makes it.
MADE = {
    "write": simple(),
    "read": simple() + b"q\0\0r",
    "an error without text": error_reply(ASKED, errno.ENOSPC, "lost", Headers.SIMPLE),
    "none": NONE,
    "read of nothing": NONE,
    "offset-data": offset_data(0x1000, b"q\0\0r"),
    "offset-hole": offset_hole(0x1000, 4),
    "a hole, then data, then the end": offset_hole(0x1001, 3, flags=0)
    + offset_data(0x1000, b"q", flags=0)
    + NONE,
    "error": error_reply(ASKED, errno.EINVAL, PAST_THE_END, Headers.STRUCTURED),
    "error-offset after some data": offset_data(0x1000, b"q", flags=0)
    + error_reply(ASKED, errno.EIO, "bad", Headers.STRUCTURED, at=0x1001),
}


def exchange_of(vector: dict[str, Any]) -> Exchange:
    request, error = vector["request"], vector.get("error")
    kind, length = request["type"], request["length"]
    if kind == Cmd.WRITE:
        call = Call(kind, request["offset"], data=bytes(length))
    else:
        call = Call(kind, request["offset"], length)
    return Exchange(
        call,
        vector["hex"],
        MADE[vector["name"]],
        bytes.fromhex(vector["data"])
        if error is None
        else (Errno(error["number"]), error["message"]),
    )


EXCHANGES = {
    name: exchange_of(vector) for name, vector in named("nbd/replies.json", "replies").items()
}

each_exchange = pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES.keys())


class Script:
    """A server that says ``data``, at most ``piece`` bytes at a time, and then closes."""

    def __init__(self, data: bytes, piece: int) -> None:
        self.data = data
        self.piece = piece

    def sendall(self, data: bytes, /) -> None: ...

    def recv(self, size: int, /) -> bytes:
        size = min(size, self.piece)
        data, self.data = self.data[:size], self.data[size:]
        return data

    def close(self) -> None: ...


def client_result(call: Call, reply: bytes, *, structured: bool, piece: int = 2**16) -> Result:
    """What a client makes of ``reply``; it reads all of it and no more."""
    script = Script(GREETING + reply, piece)
    client = NbdClient(script)
    client.structured = structured
    result: Result
    try:
        result = client.wait(client.submit(call))
    except NbdError as error:
        result = error.code, error.message
    assert script.data in {b"", b"trailing"}
    return result


def test_the_server_makes_each_of_them() -> None:
    assert MADE.keys() == EXCHANGES.keys()


@each_exchange
def test_the_server_makes_replies(exchange: Exchange) -> None:
    assert exchange.made == bytes.fromhex(exchange.text)


@each_exchange
@pytest.mark.parametrize("piece", [1, 2**16])
@pytest.mark.parametrize("trailing", [b"", b"trailing"])
def test_a_client_understands_replies(exchange: Exchange, piece: int, trailing: bytes) -> None:
    reply = bytes.fromhex(exchange.text) + trailing
    result = client_result(exchange.call, reply, structured=exchange.structured, piece=piece)
    assert result == exchange.result


@each_exchange
def test_a_client_waits_for_all_of_a_reply(exchange: Exchange) -> None:
    reply = bytes.fromhex(exchange.text)
    for size in range(len(reply)):
        with pytest.raises(EOFError):
            client_result(exchange.call, reply[:size], structured=exchange.structured)


@pytest.mark.parametrize(
    ("text", "structured"),
    [
        pytest.param("67446699 00000000 0000000000000001", False, id="magic"),
        pytest.param("67446698 00000000 0000000000000002", False, id="cookie"),
        pytest.param("668e33ef 0001 0000 0000000000000001 00000000", False, id="not negotiated"),
        pytest.param("67446698 00000000 0000000000000001", True, id="simple reply to a read"),
        pytest.param("668e33ef 0000 0000 0000000000000001 00000000", True, id="none in between"),
        pytest.param("668e33ef 0001 0000 0000000000000001 00000000", True, id="data missing"),
        pytest.param("668e33ef 0001 0000 0000000000000001 00000001 00", True, id="none with data"),
        pytest.param(
            "668e33ef 0001 0001 0000000000000001 00000008 0000000000001000", True, id="no data"
        ),
        pytest.param(
            "668e33ef 0001 0002 0000000000000001 0000000c 0000000000001001 00000004",
            True,
            id="hole beyond the request",
        ),
        pytest.param(
            "668e33ef 0001 8001 0000000000000001 00000006 00000005 0001", True, id="message"
        ),
        pytest.param("668e33ef 0001 0007 0000000000000001 00000000", True, id="unknown type"),
    ],
)
def test_a_client_tells_damaged_replies(text: str, structured: bool) -> None:
    with pytest.raises(ProtocolError):
        client_result(READ, bytes.fromhex(text), structured=structured)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        # What qemu-storage-daemon 10.0.2 answers when its blkdebug driver fails with the first.
        (errno.EPERM, Errno.EPERM),
        (errno.EROFS, Errno.EPERM),
        (errno.EIO, Errno.EIO),
        (errno.ENOMEM, Errno.ENOMEM),
        (errno.EINVAL, Errno.EINVAL),
        (errno.ENOSPC, Errno.ENOSPC),
        (errno.EDQUOT, Errno.ENOSPC),
        (errno.EFBIG, Errno.ENOSPC),
        (errno.EOVERFLOW, Errno.EOVERFLOW),
        (errno.ENOTSUP, Errno.ENOTSUP),
        (errno.ESHUTDOWN, Errno.ESHUTDOWN),
        (errno.EBADF, Errno.EINVAL),
        (errno.EBUSY, Errno.EINVAL),
        (errno.ETIMEDOUT, Errno.EINVAL),
        (errno.EREMOTEIO, Errno.EINVAL),
        # Never success, whatever was forgotten.
        (0, Errno.EINVAL),
        (None, Errno.EINVAL),
    ],
)
def test_every_error_has_an_nbd_number(number: int | None, expected: Errno) -> None:
    assert wire.nbd_errno(number) is expected


def test_a_long_message_is_cut_between_characters() -> None:
    reply = error_reply(ASKED, errno.EIO, "x" + "é" * limits.NBD_STRING_BYTES, Headers.STRUCTURED)
    result = client_result(READ, reply, structured=True)
    assert result == (Errno.EIO, "x" + "é" * (limits.NBD_STRING_BYTES // 2 - 1))


def test_a_message_with_stray_bytes_is_sent_all_the_same() -> None:
    message = b"/disk\xff".decode("utf-8", "surrogateescape")
    reply = error_reply(ASKED, errno.EIO, message, Headers.STRUCTURED)
    assert client_result(READ, reply, structured=True) == (Errno.EIO, "/disk?")


def test_the_numbers_of_the_hot_loop_are_plain() -> None:
    assert (wire.CMD_READ, wire.CMD_WRITE) == (Cmd.READ, Cmd.WRITE)
    assert type(wire.CMD_READ) is type(wire.CMD_WRITE) is int
