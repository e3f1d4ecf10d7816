"""The handshake with clients that break the rules, ask too much, or send anything at all."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.handshake import Handshake
from blockd.nbd.options import meta_data
from blockd.nbd.steps import HardDisconnect, NeedData, Reply, SoftDisconnect, Transmission
from blockd.nbd.wire import Option, Rep
from tests.helpers.nbd_codec import info_bytes, option_bytes
from tests.helpers.nbd_handshake import DISK, GREETING, PLAIN, Directory, Server, converse

FIXED = b"\0\0\0\x03"


def error_message(option: int, kind: Rep, message: str) -> bytes:
    return wire.option_reply(option, kind, message.encode())


INCONSISTENT = error_message(6, Rep.ERR_INVALID, "Inconsistent lengths in option info")
SURPLUS = error_message(6, Rep.ERR_INVALID, "option 'info' has unexpected length")
TOO_LONG_BYTES = limits.NBD_OPTION_DATA_BYTES + 1

#: The next option, which is heard as if nothing had been.
AFTER = option_bytes(Option.STARTTLS)
AFTER_REPLY = error_message(5, Rep.ERR_POLICY, "TLS not configured")

REFUSED: dict[str, tuple[int, bytes, bytes]] = {
    "list with data": (
        Option.LIST,
        b"x",
        error_message(3, Rep.ERR_INVALID, "option 'list' has unexpected length"),
    ),
    "list with a lot of data": (
        Option.LIST,
        bytes(TOO_LONG_BYTES),
        error_message(3, Rep.ERR_INVALID, "option 'list' has unexpected length"),
    ),
    "structured reply with data": (
        Option.STRUCTURED_REPLY,
        b"x",
        error_message(8, Rep.ERR_INVALID, "option 'structured reply' has unexpected length"),
    ),
    "TLS with data": (
        Option.STARTTLS,
        b"x",
        error_message(5, Rep.ERR_INVALID, "option 'starttls' has unexpected length"),
    ),
    "extended headers with data": (
        Option.EXTENDED_HEADERS,
        b"x",
        error_message(11, Rep.ERR_INVALID, "option 'extended headers' has unexpected length"),
    ),
    "contexts without structured replies": (
        Option.SET_META_CONTEXT,
        meta_data("exp", ["base:allocation"]),
        error_message(
            10,
            Rep.ERR_INVALID,
            "request option 'set meta context' when structured reply is not negotiated",
        ),
    ),
    "contexts, more queries than counted": (
        Option.LIST_META_CONTEXT,
        meta_data("exp", []) + b"x",
        error_message(9, Rep.ERR_INVALID, "option 'list meta context' has unexpected length"),
    ),
    "contexts, fewer queries than counted": (
        Option.LIST_META_CONTEXT,
        meta_data("exp", [])[:-1] + b"\1",
        error_message(9, Rep.ERR_INVALID, "Inconsistent lengths in option list meta context"),
    ),
    "contexts, too many queries": (
        Option.LIST_META_CONTEXT,
        meta_data("exp", [""] * 16384),
        error_message(9, Rep.ERR_TOO_BIG, "option 'list meta context' is longer than 65536"),
    ),
    "unknown with a lot of data": (
        2**32 - 1,
        bytes(TOO_LONG_BYTES),
        error_message(2**32 - 1, Rep.ERR_UNSUP, "Unsupported option 4294967295 (<unknown>)"),
    ),
    "info without data": (Option.INFO, b"", INCONSISTENT),
    "info with too little": (Option.INFO, bytes(5), INCONSISTENT),
    "info, name beyond the end": (Option.INFO, b"\0\0\0\x06exp\0\0", INCONSISTENT),
    "info, name of 4 GiB": (
        Option.INFO,
        b"\xff\xff\xff\xffexp\0\0",
        error_message(6, Rep.ERR_INVALID, "Invalid name length: 4294967295"),
    ),
    "info, count beyond the end": (Option.INFO, b"\0\0\0\x03exp\0\x02\0\x01", INCONSISTENT),
    "info, more than counted": (Option.INFO, b"\0\0\0\x03exp\0\0\0\x01", SURPLUS),
    "info, half a request": (Option.INFO, b"\0\0\0\x03exp\0\0x", SURPLUS),
    "info, not UTF-8": (
        Option.INFO,
        info_bytes(b"\xff\xfe"),
        error_message(6, Rep.ERR_INVALID, "export name is not valid UTF-8"),
    ),
    "go, NUL": (
        Option.GO,
        info_bytes(b"exp\0b"),
        error_message(7, Rep.ERR_INVALID, "Unexpected embedded NUL in option go"),
    ),
    "info, name too long": (
        Option.INFO,
        info_bytes(b"n" * 4097),
        error_message(6, Rep.ERR_INVALID, "Invalid name length: 4097"),
    ),
    "info, longest name": (
        Option.INFO,
        info_bytes(b"n" * 4096),
        error_message(6, Rep.ERR_UNKNOWN, f"export '{'n' * 80}...' not present"),
    ),
    "info, name cut between characters": (
        Option.INFO,
        info_bytes(("x" + "é" * 40).encode()),
        error_message(6, Rep.ERR_UNKNOWN, f"export 'x{'é' * 39}...' not present"),
    ),
    "info, name just short enough": (
        Option.INFO,
        info_bytes(("é" * 40).encode()),
        error_message(6, Rep.ERR_UNKNOWN, f"export '{'é' * 40}' not present"),
    ),
    "info, too big": (
        Option.INFO,
        info_bytes(b"nope", *[1] * 32764),
        error_message(6, Rep.ERR_TOO_BIG, "option 'info' is longer than 65536"),
    ),
    "info, just not too big": (
        Option.INFO,
        info_bytes(b"nope", *[1] * 32763),
        error_message(6, Rep.ERR_UNKNOWN, "export 'nope' not present"),
    ),
}


@pytest.mark.parametrize("piece", [1, 2**16])
@pytest.mark.parametrize(("option", "data", "reply"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_options_are_answered_and_the_next_one_heard(
    option: int, data: bytes, reply: bytes, piece: int
) -> None:
    sent, step = converse(FIXED + option_bytes(option, data) + AFTER, piece)
    assert (sent, step) == (GREETING + reply + AFTER_REPLY, NeedData())


def test_structured_replies_are_negotiated_once() -> None:
    sent, _ = converse(FIXED + option_bytes(Option.STRUCTURED_REPLY) * 2)
    ack = wire.option_reply(Option.STRUCTURED_REPLY, Rep.ACK)
    again = error_message(8, Rep.ERR_INVALID, "structured reply already negotiated")
    assert sent == GREETING + ack + again


def test_extended_headers_are_negotiated_once_and_for_all() -> None:
    options = (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.EXTENDED_HEADERS)
    sent, step = converse(
        FIXED
        + b"".join(map(option_bytes, (*options, Option.STRUCTURED_REPLY)))
        + option_bytes(Option.EXPORT_NAME, b"exp")
    )
    acks = b"".join(wire.option_reply(option, Rep.ACK) for option in options[:2])
    again = "extended headers already negotiated"
    refused = error_message(11, Rep.ERR_INVALID, again) + error_message(
        8, Rep.ERR_EXT_HEADER_REQD, again
    )
    assert sent == GREETING + acks + refused
    assert step == HardDisconnect("Extended headers already negotiated")


def header(option: int, length: int) -> bytes:
    return wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, option, length)


DISCONNECTED = {
    "unknown client flag": (b"\0\0\0\x07", "unknown client flags 0x7"),
    "unknown highest client flag": (b"\x80\0\0\x03", "unknown client flags 0x80000003"),
    "magic": (FIXED + bytes(16), "bad option magic 0x0000000000000000"),
    "reply's magic": (
        FIXED + wire.option_reply(3, Rep.ACK)[:16],
        "bad option magic 0x0003e889045565a9",
    ),
    "option's data beyond all bounds": (
        FIXED + header(99, limits.NBD_OPTION_DRAIN_BYTES + 1),
        "option 99 (<unknown>) with 33554433 bytes of data",
    ),
    "list without fixed newstyle": (
        b"\0\0\0\x02" + header(Option.LIST, 0),
        "option 3 (list) from a client without fixed newstyle",
    ),
    "abort without fixed newstyle": (
        b"\0\0\0\0" + header(Option.ABORT, 0),
        "option 2 (abort) from a client without fixed newstyle",
    ),
    "no such export": (
        FIXED + option_bytes(Option.EXPORT_NAME, b"nope"),
        "export 'nope' not present",
    ),
    "export name too long": (FIXED + header(Option.EXPORT_NAME, 4097), "export name of 4097 bytes"),
    "export name not UTF-8": (
        FIXED + option_bytes(Option.EXPORT_NAME, b"\xc3"),
        "export name is not valid UTF-8",
    ),
    "export name with NUL": (
        FIXED + option_bytes(Option.EXPORT_NAME, b"exp\0"),
        "Unexpected embedded NUL in option export name",
    ),
}


@pytest.mark.parametrize("piece", [1, 2**16])
@pytest.mark.parametrize(("data", "reason"), DISCONNECTED.values(), ids=DISCONNECTED.keys())
def test_what_has_no_answer_disconnects(data: bytes, reason: str, piece: int) -> None:
    assert converse(data, piece) == (GREETING, HardDisconnect(reason))


def test_only_so_many_options() -> None:
    option = option_bytes(Option.INFO, info_bytes(b"x"))
    reply = error_message(6, Rep.ERR_UNKNOWN, "export 'x' not present")
    sent, step = converse(FIXED + option * limits.NBD_OPTIONS_LIMIT)
    assert (sent, step) == (GREETING + reply * limits.NBD_OPTIONS_LIMIT, NeedData())
    sent, step = converse(FIXED + option * limits.NBD_OPTIONS_LIMIT + option_bytes(Option.ABORT))
    assert step == HardDisconnect("more than 4096 options")


def test_an_abort_is_not_kept_waiting_for_its_data() -> None:
    ack = wire.option_reply(Option.ABORT, Rep.ACK)
    assert converse(FIXED + header(Option.ABORT, 100)) == (GREETING + ack, SoftDisconnect(ack))


def test_one_reply_at_a_time_however_many_options_are_fed() -> None:
    handshake = Handshake(Directory(DISK))
    assert handshake.step() == Reply(GREETING)
    handshake.feed(FIXED + AFTER * 3)
    reply = Reply(AFTER_REPLY)
    assert [handshake.step() for _ in range(4)] == [reply, reply, reply, NeedData()]


def test_drained_data_are_not_kept() -> None:
    handshake = Handshake(Directory(DISK))
    handshake.step()
    handshake.feed(FIXED + header(99, limits.NBD_OPTION_DRAIN_BYTES))
    piece = bytes(limits.MIB)
    for _ in range(limits.NBD_OPTION_DRAIN_BYTES // limits.MIB):
        assert handshake.step() == NeedData()
        assert not handshake._received
        handshake.feed(piece)
    assert handshake.step() == Reply(
        error_message(99, Rep.ERR_UNSUP, "Unsupported option 99 (<unknown>)")
    )


# --- anything at all -------------------------------------------------------------------------

Edit: TypeAlias = tuple[int, bytes]

lengths = st.sampled_from([0, 1, 4, 4096, 4097, 65536, 65537, 2**25, 2**25 + 1, 2**32 - 1])
names = st.one_of(st.sampled_from([b"exp", b"", b"nope", b"\xff", b"n" * 4097]), st.binary())
parts = st.one_of(
    st.binary(max_size=64),
    st.builds(option_bytes, st.integers(0, 12), st.binary(max_size=32)),
    st.builds(
        lambda option, name, asked: option_bytes(option, info_bytes(name, *asked)),
        st.sampled_from([Option.INFO, Option.GO]),
        names,
        st.lists(st.integers(0, 5)),
    ),
    st.builds(option_bytes, st.just(Option.EXPORT_NAME), names),
    st.builds(header, st.integers(0, 12), lengths),
    st.builds(bytes, st.sampled_from([65536, 70000])),
)
edits = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=2)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    for position, replacement in changes:
        data = data[:position] + replacement + data[position + 1 :]
    return data


def check_replies(sent: bytes) -> None:
    """Nothing but replies to options."""
    while sent:
        magic, _, kind, length = wire.OPTION_REPLY.unpack_from(sent)
        assert magic == wire.OPTION_REPLY_MAGIC
        assert Rep(kind)
        assert len(sent) >= wire.OPTION_REPLY.size + length
        sent = sent[wire.OPTION_REPLY.size + length :]


@given(
    st.sampled_from([3, 1, 2, 0, 4]),
    st.lists(parts, max_size=6),
    edits,
    st.integers(1, 100_000),
)
def test_whatever_a_client_sends(
    flags: int, session: list[bytes], changes: list[Edit], piece: int
) -> None:
    """No exception; never more kept than one option; only well-formed replies; a sound end."""
    data = flags.to_bytes(4) + edited(b"".join(session), changes)
    server = Server()
    for position in range(0, len(data), piece):
        server.sendall(data[position : position + piece])
        if not isinstance(server.step, NeedData):
            break
        assert len(server.handshake._received) < limits.NBD_OPTION_DATA_BYTES
    sent = bytes(server.sent).removeprefix(GREETING)
    if isinstance(server.step, Transmission):
        assert server.step.export in (DISK, PLAIN)
        assert len(server.step.early) < piece
        sent = sent.removesuffix(server.step.reply)
    check_replies(sent)
