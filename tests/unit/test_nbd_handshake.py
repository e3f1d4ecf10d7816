"""The handshake: one table of conversations for both ends, in pieces of every size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from blockd.nbd.handshake import ExportInfo, NeedData, SoftDisconnect, Step, Transmission
from blockd.nbd.wire import Info, Option, Rep
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import ExportReply, NbdError
from tests.helpers.nbd_handshake import DISK, GREETING, PLAIN, Server, converse


def options(*texts: str) -> bytes:
    """What a client sends: the magic, then option, length and data."""
    return b"".join(bytes.fromhex("49484156454f5054" + text) for text in texts)


def replies(*texts: str) -> bytes:
    """What a server answers: the magic, then option, type, length and data."""
    return b"".join(bytes.fromhex("0003e889045565a9" + text) for text in texts)


def refusal(action: Callable[[NbdClient], object]) -> Callable[[NbdClient], object]:
    """``action`` is refused; gives the reply's type and message."""

    def refused(client: NbdClient) -> object:
        with pytest.raises(NbdError) as caught:
            action(client)
        return caught.value.code, caught.value.message

    return refused


def hexed(text: str) -> str:
    return text.encode().hex()


@dataclass
class Case:
    """A conversation after the greeting, and the client's call that leads it."""

    flags: int
    client: bytes
    server: bytes
    end: Callable[[bytes], Step]  # what is left of the client's bytes -> the last step
    action: Callable[[NbdClient], object]
    result: object


def waits(_: bytes) -> Step:
    return NeedData()


def transmission(
    export: ExportInfo, reply: bytes, *, structured: bool = False
) -> Callable[[bytes], Step]:
    return lambda early: Transmission(export, structured, reply, early)


INFO_NAME = "00000003 00000005 0001" + hexed("exp")
INFO_DESCRIPTION = "00000003 0000000b 0002" + hexed("the descr")
INFO_SIZES = "00000003 0000000e 0003 00000001 00001000 02000000"
INFO_EXPORT = "00000003 0000000c 0000 0000000000100000 0d6d"
ACK = "00000001 00000000"

GO_REPLY = replies(
    *("00000007" + text for text in (INFO_DESCRIPTION, INFO_SIZES, INFO_EXPORT, ACK))
)
GO_STRUCTURED = replies(
    *("00000007" + text for text in (INFO_DESCRIPTION, INFO_SIZES)),
    "00000007 00000003 0000000c 0000 0000000000100000 0ded",
    "00000007" + ACK,
)


def go_structured(client: NbdClient) -> object:
    client.structured_replies()
    return client.go("exp")


CASES = {
    "list": Case(
        3,
        options("00000003 00000000"),
        replies(
            "00000003 00000002 00000010 00000003" + hexed("exp") + hexed("the descr"),
            "00000003 00000002 00000004 00000000",
            "00000003" + ACK,
        ),
        waits,
        NbdClient.list_exports,
        [("exp", "the descr"), ("", "")],
    ),
    "info, everything asked for": Case(
        3,
        options("00000006 0000000f 00000003" + hexed("exp") + "0003 0001 0002 0003"),
        replies(
            *("00000006" + t for t in (INFO_NAME, INFO_DESCRIPTION, INFO_SIZES, INFO_EXPORT, ACK))
        ),
        waits,
        lambda client: client.info("exp", *list(Info)[1:]),
        ExportReply(1 << 20, 0xD6D, "exp", "the descr", (1, 4096, 1 << 25)),
    ),
    "info, asked twice and for the unknown": Case(
        3,
        options("00000006 0000000f 00000003" + hexed("exp") + "0003 0001 0001 004d"),
        replies(
            *("00000006" + t for t in (INFO_NAME, INFO_DESCRIPTION, INFO_SIZES, INFO_EXPORT, ACK))
        ),
        waits,
        lambda client: client.info("exp", 1, 1, 77),
        ExportReply(1 << 20, 0xD6D, "exp", "the descr", (1, 4096, 1 << 25)),
    ),
    "info, empty name, no description": Case(
        3,
        options("00000006 00000008 00000000 0001 0001"),
        replies(
            "00000006 00000003 00000002 0001",
            "00000006 00000003 0000000e 0003 00000200 00010000 ffffffff",
            "00000006 00000003 0000000c 0000 7ffffffffffffe00 0003",
            "00000006" + ACK,
        ),
        waits,
        lambda client: client.info("", Info.NAME),
        ExportReply(2**63 - 512, 3, "", None, (512, 65536, 2**32 - 1)),
    ),
    "go": Case(
        3,
        options("00000007 00000009 00000003" + hexed("exp") + "0000"),
        GO_REPLY,
        transmission(DISK, GO_REPLY),
        lambda client: client.go("exp"),
        ExportReply(1 << 20, 0xD6D, None, "the descr", (1, 4096, 1 << 25)),
    ),
    "structured replies, go": Case(
        3,
        options("00000008 00000000", "00000007 00000009 00000003" + hexed("exp") + "0000"),
        replies("00000008" + ACK) + GO_STRUCTURED,
        transmission(DISK, GO_STRUCTURED, structured=True),
        go_structured,
        ExportReply(1 << 20, 0xDED, None, "the descr", (1, 4096, 1 << 25)),
    ),
    "export name, without zeroes": Case(
        2,
        options("00000001 00000003" + hexed("exp")),
        bytes.fromhex("0000000000100000 0d6d"),
        transmission(DISK, bytes.fromhex("0000000000100000 0d6d")),
        lambda client: client.export_name("exp"),
        ExportReply(1 << 20, 0xD6D),
    ),
    "export name, with zeroes": Case(
        0,
        options("00000001 00000003" + hexed("exp")),
        bytes.fromhex("0000000000100000 0d6d") + bytes(124),
        transmission(DISK, bytes.fromhex("0000000000100000 0d6d") + bytes(124)),
        lambda client: client.export_name("exp"),
        ExportReply(1 << 20, 0xD6D),
    ),
    "default export, fixed newstyle, with zeroes": Case(
        1,
        options("00000001 00000000"),
        bytes.fromhex("7ffffffffffffe00 0003") + bytes(124),
        transmission(PLAIN, bytes.fromhex("7ffffffffffffe00 0003") + bytes(124)),
        lambda client: client.export_name(""),
        ExportReply(2**63 - 512, 3),
    ),
    "abort": Case(
        3,
        options("00000002 00000000"),
        replies("00000002" + ACK),
        lambda _: SoftDisconnect(replies("00000002" + ACK)),
        lambda client: client.option(Option.ABORT),
        [],
    ),
    "abort with data": Case(
        3,
        options("00000002 00000003 616263"),
        replies("00000002" + ACK),
        lambda _: SoftDisconnect(replies("00000002" + ACK)),
        lambda client: client.option(Option.ABORT, b"abc"),
        [],
    ),
    "no such export": Case(
        3,
        options("00000007 0000000a 00000004" + hexed("nope") + "0000"),
        replies("00000007 80000006 00000019" + hexed("export 'nope' not present")),
        waits,
        refusal(lambda client: client.go("nope")),
        (Rep.ERR_UNKNOWN, "export 'nope' not present"),
    ),
    "TLS": Case(
        3,
        options("00000005 00000000"),
        replies("00000005 80000002 00000012" + hexed("TLS not configured")),
        waits,
        refusal(lambda client: client.option(Option.STARTTLS)),
        (Rep.ERR_POLICY, "TLS not configured"),
    ),
    "unknown option": Case(
        3,
        options("00000063 00000003 616263"),
        replies("00000063 80000001 00000021" + hexed("Unsupported option 99 (<unknown>)")),
        waits,
        refusal(lambda client: client.option(99, b"abc")),
        (Rep.ERR_UNSUP, "Unsupported option 99 (<unknown>)"),
    ),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
@pytest.mark.parametrize("piece", [1, 7, 2**16])
def test_the_server_answers(case: Case, piece: int) -> None:
    data = case.flags.to_bytes(4) + case.client
    assert converse(data, piece) == (GREETING + case.server, case.end(b""))


@each_case
def test_what_comes_after_belongs_to_the_next_phase(case: Case) -> None:
    """A few bytes more never change an answer; they reach the transmission phase whole."""
    data = case.flags.to_bytes(4) + case.client + b"trailing"
    assert converse(data) == (GREETING + case.server, case.end(b"trailing"))


@each_case
def test_the_server_says_nothing_before_it_has_heard_all(case: Case) -> None:
    data = case.flags.to_bytes(4) + case.client
    needed = len(data) - (3 if case is CASES["abort with data"] else 0)
    for size in range(needed):
        sent, step = converse(data[:size])
        assert isinstance(step, NeedData)
        assert case.server.startswith(sent[len(GREETING) :])
        assert sent[len(GREETING) :] != case.server


@each_case
def test_a_client_leads_the_conversation(case: Case) -> None:
    server = Server()
    client = NbdClient(server, flags=case.flags)
    assert case.action(client) == case.result
    assert server.received == case.flags.to_bytes(4) + case.client
    assert not server.sent


@each_case
def test_the_end_is_the_end(case: Case) -> None:
    server = Server()
    server.sendall(case.flags.to_bytes(4) + case.client)
    if not isinstance(server.step, NeedData):
        server.handshake.feed(case.client)
        assert server.handshake.step() is server.step
