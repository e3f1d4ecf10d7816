"""A handshake on a server that insists on TLS: what is answered before, and after."""

from __future__ import annotations

import pytest

from blockd.nbd import wire
from blockd.nbd.handshake import Handshake
from blockd.nbd.steps import HardDisconnect, NeedData, Reply, SoftDisconnect, StartTls, Step
from blockd.nbd.wire import Option, Rep
from tests.helpers.nbd_codec import info_bytes, option_bytes
from tests.helpers.nbd_handshake import DISK, Directory

FIXED = (3).to_bytes(4)
ACK = wire.option_reply(Option.STARTTLS, Rep.ACK)


def begun(flags: bytes = FIXED) -> Handshake:
    """A handshake whose greeting has been answered."""
    handshake = Handshake(Directory(DISK), tls=True)
    assert isinstance(handshake.step(), Reply)
    handshake.feed(flags)
    return handshake


def answer(handshake: Handshake, data: bytes) -> Step:
    handshake.feed(data)
    return handshake.step()


def required(option: int) -> bytes:
    message = f"Option 0x{option:x} not permitted before TLS".encode()
    return wire.option_reply(option, Rep.ERR_TLS_REQD, message)


@pytest.mark.parametrize(
    "option",
    [
        Option.LIST,
        Option.INFO,
        Option.GO,
        Option.STRUCTURED_REPLY,
        Option.LIST_META_CONTEXT,
        Option.SET_META_CONTEXT,
        Option.EXTENDED_HEADERS,
        99,
    ],
)
@pytest.mark.parametrize("data", [b"", info_bytes(b"exp"), bytes(100_000)])
def test_whatever_else_is_asked_for_before_is_refused(option: int, data: bytes) -> None:
    handshake = begun()
    assert answer(handshake, option_bytes(option, data)) == Reply(required(option))
    assert isinstance(handshake.step(), NeedData)
    assert isinstance(answer(handshake, option_bytes(Option.STARTTLS)), StartTls)


def test_who_leaves_is_told_the_same() -> None:
    left = answer(begun(), option_bytes(Option.ABORT))
    assert left == SoftDisconnect(required(Option.ABORT))


@pytest.mark.parametrize("flags", [FIXED, bytes(4)])
def test_an_option_that_can_not_be_refused_ends_it(flags: bytes) -> None:
    end = answer(begun(flags), option_bytes(Option.EXPORT_NAME, b"exp"))
    assert end == HardDisconnect("Option 0x1 not permitted before TLS")


def test_who_has_no_fixed_newstyle_has_no_tls() -> None:
    assert isinstance(answer(begun(bytes(4)), option_bytes(Option.STARTTLS)), HardDisconnect)


def test_tls_is_started_once() -> None:
    handshake = begun()
    with_data = answer(handshake, option_bytes(Option.STARTTLS, b"x"))
    message = b"option 'starttls' has unexpected length"
    assert with_data == Reply(wire.option_reply(Option.STARTTLS, Rep.ERR_INVALID, message))
    assert answer(handshake, option_bytes(Option.STARTTLS)) == StartTls(ACK, b"")
    again = wire.option_reply(Option.STARTTLS, Rep.ERR_INVALID, b"TLS already enabled")
    assert answer(handshake, option_bytes(Option.STARTTLS)) == Reply(again)
    listed = answer(handshake, option_bytes(Option.LIST))
    assert isinstance(listed, Reply)
    assert b"exp" in listed.data


def test_what_came_before_the_encryption_is_never_taken_for_an_option() -> None:
    """Whoever sits between the ends could have put it there."""
    handshake = begun()
    injected = option_bytes(Option.GO, info_bytes(b"exp"))
    assert answer(handshake, option_bytes(Option.STARTTLS) + injected) == StartTls(ACK, injected)
    assert isinstance(handshake.step(), NeedData)
