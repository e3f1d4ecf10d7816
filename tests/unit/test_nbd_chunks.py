"""Extended headers, block status and meta contexts against the published vectors."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd import limits
from blockd.nbd import chunks, options, wire
from blockd.nbd.chunks import Chunk, Runs, chunk, error_reply
from blockd.nbd.options import OptionError
from blockd.nbd.wire import Cmd, Headers, Option, ProtocolError, Rep, ReplyType, Request
from tests.helpers.nbd_codec import Call, NbdError, Pending
from tests.helpers.vectors import named

EXTENDED = Headers.EXTENDED


def vectors(name: str, part: str) -> pytest.MarkDecorator:
    found = named(f"nbd/{name}.json", part)
    return pytest.mark.parametrize("vector", found.values(), ids=found)


# --- requests --------------------------------------------------------------------------------


@vectors("extended", "requests")
def test_extended_requests(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    fields = ("flags", "type", "cookie", "offset", "length")
    request = Request(*(vector[name] for name in fields))
    payload = bytes.fromhex(vector.get("payload", ""))
    assert wire.request_header(request, extended=True) + payload == data
    assert wire.parse_request(b"before" + data, 6, extended=True) == request
    for size in range(wire.EXTENDED_REQUEST.size):
        assert wire.parse_request(data[:size], extended=True) is None
    with pytest.raises(ProtocolError, match="bad request magic 0x21e41c71"):
        wire.parse_request(data)
    if "filter" in vector:
        told = (vector["filter"]["length"], vector["filter"]["contexts"])
        assert chunks.parse_status_filter(payload) == told
        assert chunks.status_filter(*told) == payload


def test_a_filter_has_a_length_and_whole_contexts() -> None:
    payload = chunks.status_filter(1, [2, 3])
    whole = {8: (1, []), 12: (1, [2]), 16: (1, [2, 3])}
    for size in range(len(payload) + 1):
        assert chunks.parse_status_filter(payload[:size]) == whole.get(size)


# --- replies ---------------------------------------------------------------------------------

ASKED = Request(0, Cmd.READ, 1, 0x1000, 4)


def data_of(offset: int, data: bytes) -> bytes:
    return wire.OFFSET.pack(offset) + data


def extended(
    kind: ReplyType, payload: bytes = b"", *, done: bool = True, asked: Request = ASKED
) -> bytes:
    return chunk(asked, kind, payload, extended=True, done=done)


#: Each published reply as our server makes it.
MADE = {
    "done": extended(ReplyType.NONE),
    "offset-data": extended(ReplyType.OFFSET_DATA, data_of(0x1000, b"q\0\0r")),
    "a hole, then data, then the end": extended(
        ReplyType.OFFSET_HOLE, chunks.hole(0x1001, 3), done=False
    )
    + extended(ReplyType.OFFSET_DATA, data_of(0x1000, b"q"), done=False)
    + extended(ReplyType.NONE),
    "error": error_reply(ASKED._replace(offset=1 << 20), errno.EINVAL, "nope", EXTENDED),
    "error-offset after some data": extended(
        ReplyType.OFFSET_DATA, data_of(0x1000, b"q"), done=False
    )
    + error_reply(ASKED, errno.EIO, "bad", EXTENDED, at=0x1001),
}


@vectors("extended", "replies")
def test_extended_replies(vector: dict[str, Any]) -> None:
    data, asked = bytes.fromhex(vector["hex"]), vector["request"]
    assert MADE[vector["name"]] == data
    call = Call(asked["type"], asked["offset"], asked["length"])
    pending = Pending(call, bytearray(asked["length"] if call.cmd == Cmd.READ else 0))
    done = False
    while not done:
        head, data = data[: wire.EXTENDED_HEADER.size], data[wire.EXTENDED_HEADER.size :]
        flags, kind, cookie, offset, length = chunks.parse_chunk(head, extended=True)
        assert (cookie, offset) == (1, call.offset)
        done = bool(flags & wire.ReplyFlag.DONE)
        pending.take_chunk(kind, data[:length], done=done)
        data = data[length:]
    assert not data
    if "error" in vector:
        assert isinstance(pending.error, NbdError)
        told = vector["error"]
        assert (pending.error.code, pending.error.message) == (told["number"], told["message"])
    else:
        assert pending.data == bytes.fromhex(vector["data"])


def test_a_header_of_either_form() -> None:
    short = chunk(ASKED, ReplyType.NONE, extended=False)
    assert chunks.parse_chunk(short, extended=False) == Chunk(1, 0, 1, None, 0)
    assert chunks.parse_chunk(extended(ReplyType.NONE), extended=True) == Chunk(1, 0, 1, 0x1000, 0)
    for form in (False, True):
        wrong = bytes([0xFF]) + chunk(ASKED, ReplyType.NONE, extended=form)[1:]
        with pytest.raises(ProtocolError, match="bad reply magic 0xff"):
            chunks.parse_chunk(wrong, extended=form)


# --- payloads --------------------------------------------------------------------------------


@vectors("block-status", "statuses")
def test_block_status(vector: dict[str, Any]) -> None:
    data, form = bytes.fromhex(vector["hex"]), vector["extended"]
    lengths, flags = zip(*vector["runs"], strict=True)
    assert chunks.status(vector["context"], Runs(lengths, flags), extended=form) == data
    context, runs = chunks.parse_status(memoryview(data), extended=form)
    assert (context, tuple(runs.lengths), tuple(runs.flags)) == (vector["context"], lengths, flags)
    for size in range(len(data)):
        if form or (size - 4) % 8 or size == 4:
            with pytest.raises(ProtocolError):
                chunks.parse_status(data[:size], extended=form)


@vectors("block-status", "damaged")
def test_damaged_block_status(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        chunks.parse_status(bytes.fromhex(vector["hex"]), extended=vector["extended"])


def test_holes() -> None:
    assert chunks.parse_hole(chunks.hole(1 << 40, 512)) == (1 << 40, 512)
    for size in (0, 11, 13):
        with pytest.raises(ProtocolError):
            chunks.parse_hole(bytes(size))


@pytest.mark.parametrize("at", [None, 0x1002])
def test_errors(at: int | None) -> None:
    reply = error_reply(ASKED, errno.EIO, "bäd", Headers.STRUCTURED, at=at)
    head, payload = reply[: wire.STRUCTURED_HEADER.size], reply[wire.STRUCTURED_HEADER.size :]
    assert chunks.is_error(chunks.parse_chunk(head, extended=False).type)
    assert chunks.parse_error(payload) == (errno.EIO, "bäd")
    for size in range(6 + len("bäd".encode())):
        with pytest.raises(ProtocolError):
            chunks.parse_error(payload[:size])
    with pytest.raises(ProtocolError, match="an error that is none"):
        chunks.parse_error(bytes(6))


@given(st.binary(max_size=64), st.booleans())
def test_any_payload_is_understood_or_refused(data: bytes, form: bool) -> None:
    for parse in (
        chunks.parse_error,
        chunks.parse_hole,
        options.parse_meta_context,
        chunks.parse_status_filter,
        lambda payload: chunks.parse_status(payload, extended=form),
    ):
        try:
            parse(data)
        except ProtocolError:
            continue


# --- meta contexts ---------------------------------------------------------------------------


@vectors("meta-contexts", "queries")
def test_meta_queries(vector: dict[str, Any]) -> None:
    data, told = bytes.fromhex(vector["hex"]), (vector["export"], vector["queries"])
    assert options.meta_data(*told) == data
    assert options.parse_meta(Option.SET_META_CONTEXT, data) == told
    for size in range(len(data)):
        with pytest.raises(OptionError, match="Inconsistent lengths in option set meta context"):
            options.parse_meta(Option.SET_META_CONTEXT, data[:size])
    with pytest.raises(OptionError, match="option 'set meta context' has unexpected length"):
        options.parse_meta(Option.SET_META_CONTEXT, data + b"x")


@vectors("meta-contexts", "contexts")
def test_meta_contexts(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert options.meta_context(vector["id"], vector["name"]) == data
    assert options.parse_meta_context(data) == (vector["id"], vector["name"])
    for size in range(5):
        with pytest.raises(ProtocolError):
            options.parse_meta_context(data[:size])


def test_queries_that_are_no_names_ask_for_nothing() -> None:
    queries = [b"\xff", b"x" * (limits.NBD_STRING_BYTES + 1), b"base:allocation"]
    data = wire.U32.pack(0) + wire.U32.pack(len(queries))
    data += b"".join(wire.U32.pack(len(query)) + query for query in queries)
    assert options.parse_meta(Option.LIST_META_CONTEXT, data) == (
        "",
        ["", "", "base:allocation"],
    )


def test_a_query_with_a_nul_is_refused() -> None:
    with pytest.raises(OptionError, match="Unexpected embedded NUL in option") as raised:
        options.parse_meta(Option.LIST_META_CONTEXT, options.meta_data("", ["base:\0"]))
    assert raised.value.kind is Rep.ERR_INVALID


def test_infos_are_asked_for() -> None:
    data = options.info_data("exp", [3, 1])
    assert options.parse_info(Option.GO, data) == ("exp", {1, 3})
