"""The handshake: one table of conversations for both ends, in pieces of every size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from blockd.nbd.steps import NeedData, SoftDisconnect, Step, Transmission
from blockd.nbd.wire import Headers, Info, Option, Rep, TransmissionFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import ExportReply, NbdError
from tests.helpers.nbd_handshake import CONTEXTS, DISK, GREETING, PLAIN, Server, converse
from tests.helpers.vectors import load, named


def refusal(action: Callable[[NbdClient], object]) -> Callable[[NbdClient], object]:
    """``action`` is refused; gives the reply's type and message."""

    def refused(client: NbdClient) -> object:
        with pytest.raises(NbdError) as caught:
            action(client)
        return caught.value.code, caught.value.message

    return refused


@dataclass
class Case:
    """A conversation after the greeting, and the client's call that leads it."""

    flags: int
    client: bytes
    server: bytes
    end: Callable[[bytes], Step]  # what is left of the client's bytes -> the last step
    action: Callable[[NbdClient], object]
    result: object


def go_structured(client: NbdClient) -> object:
    client.structured_replies()
    return client.go("exp")


def go_extended(*queries: str, of: str = "exp") -> Callable[[NbdClient], object]:
    """Extended headers, contexts of an export, and then into ``exp``; those and what it says."""

    def action(client: NbdClient) -> object:
        client.extended_headers()
        contexts = client.set_contexts(of, *queries)
        return contexts, client.go("exp")

    return action


def contexts_in_vain(client: NbdClient) -> object:
    """Selected, then selected anew with a mistake."""
    client.structured_replies()
    client.set_contexts("exp", "base:allocation")
    with pytest.raises(NbdError, match="export 'nope' not present"):
        client.set_contexts("nope", "base:allocation")
    return client.go("exp")


def listed(*queries: str, of: str = "exp") -> Callable[[NbdClient], object]:
    return lambda client: client.list_contexts(of, *queries)


TOLD_ALL = ExportReply(1 << 20, 0xD6D, "exp", "the descr", (1, 4096, 1 << 25))
TOLD_SOME = ExportReply(1 << 20, 0xD6D, None, "the descr", (1, 4096, 1 << 25))

#: For each published handshake the client's call that leads it, and what the client makes of it.
CALLS: dict[str, tuple[Callable[[NbdClient], object], object]] = {
    "list": (NbdClient.list_exports, [("exp", "the descr"), ("", "")]),
    "info, everything asked for": (
        lambda client: client.info("exp", *list(Info)[1:]),
        TOLD_ALL,
    ),
    "info, asked twice and for the unknown": (
        lambda client: client.info("exp", 1, 1, 77),
        TOLD_ALL,
    ),
    "info, empty name, no description": (
        lambda client: client.info("", Info.NAME),
        ExportReply(2**63 - 512, 3, "", None, (512, 65536, 2**32 - 1)),
    ),
    "go": (lambda client: client.go("exp"), TOLD_SOME),
    "structured replies, go": (go_structured, TOLD_SOME._replace(flags=0xDED)),
    "extended headers, contexts, go": (
        go_extended("qemu:dirty-bitmap:b", "nope:x", "base:allocation", "base:allocation"),
        ({"base:allocation": 0, "qemu:dirty-bitmap:b": 2}, TOLD_SOME._replace(flags=0x1DED)),
    ),
    "extended headers, wildcards select nothing, go": (
        go_extended("base:", "qemu:", "qemu:dirty-bitmap:", ""),
        ({}, TOLD_SOME._replace(flags=0xDED)),
    ),
    "extended headers, contexts of another export, go": (
        go_extended("base:allocation", of=""),
        ({"base:allocation": 0}, TOLD_SOME._replace(flags=0xDED)),
    ),
    "contexts are forgotten at the next selection": (
        contexts_in_vain,
        TOLD_SOME._replace(flags=0xDED),
    ),
    "list all contexts": (listed(), list(CONTEXTS.values())),
    "list contexts by wildcards": (listed("qemu:"), list(CONTEXTS.values())[1:]),
    "list contexts by a wildcard of bitmaps": (
        listed("qemu:dirty-bitmap:", "qemu:x"),
        [CONTEXTS[2]],
    ),
    "list contexts that are not there": (listed("qemu:dirty-bitmap:c", "x:", ""), []),
    "list contexts of no export": (
        refusal(listed(of="nope")),
        (Rep.ERR_UNKNOWN, "export 'nope' not present"),
    ),
    "export name, without zeroes": (
        lambda client: client.export_name("exp"),
        ExportReply(1 << 20, 0xD6D),
    ),
    "export name, with zeroes": (
        lambda client: client.export_name("exp"),
        ExportReply(1 << 20, 0xD6D),
    ),
    "default export, fixed newstyle, with zeroes": (
        lambda client: client.export_name(""),
        ExportReply(2**63 - 512, 3),
    ),
    "abort": (lambda client: client.option(Option.ABORT), []),
    "abort with data": (lambda client: client.option(Option.ABORT, b"abc"), []),
    "no such export": (
        refusal(lambda client: client.go("nope")),
        (Rep.ERR_UNKNOWN, "export 'nope' not present"),
    ),
    "TLS": (
        refusal(lambda client: client.option(Option.STARTTLS)),
        (Rep.ERR_POLICY, "TLS not configured"),
    ),
    "unknown option": (
        refusal(lambda client: client.option(99, b"abc")),
        (Rep.ERR_UNSUP, "Unsupported option 99 (<unknown>)"),
    ),
}


def bytes_of(messages: Iterable[dict[str, str]]) -> bytes:
    return b"".join(bytes.fromhex(message["hex"]) for message in messages)


def end_of(vector: dict[str, Any]) -> Callable[[bytes], Step]:
    """How the server stands when the conversation is over."""
    if vector["then"] == "more options":
        return lambda _: NeedData()
    messages = vector["messages"]
    last = max(number for number, each in enumerate(messages) if each["from"] == "client")
    reply = bytes_of(messages[last + 1 :])
    if vector["then"] == "closed":
        return lambda _: SoftDisconnect(reply)
    export = {each.name: each for each in (DISK, PLAIN)}[vector["export"]]
    headers = Headers[vector["headers"]]
    contexts = tuple(vector["contexts"])
    return lambda early: Transmission(export, headers, contexts, reply, early)


def case_of(vector: dict[str, Any]) -> Case:
    flags, *client = (each for each in vector["messages"] if each["from"] == "client")
    server = (each for each in vector["messages"] if each["from"] == "server")
    return Case(
        int(flags["hex"], 16),
        bytes_of(client),
        bytes_of(server),
        end_of(vector),
        *CALLS[vector["name"]],
    )


CASES = {
    name: case_of(vector) for name, vector in named("nbd/handshake.json", "handshakes").items()
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def test_the_published_server_is_the_one_that_is_asked() -> None:
    published = load("nbd/handshake.json")
    assert bytes.fromhex(published["greeting"]["hex"]) == GREETING
    assert published["exports"] == [
        {
            "name": export.name,
            "description": export.description,
            "size": export.size_bytes,
            "flags": export.flags | TransmissionFlag.HAS_FLAGS,
            "block-sizes": [
                export.minimum_block_bytes,
                export.preferred_block_bytes,
                export.maximum_block_bytes,
            ],
            "contexts": {str(number): name for number, name in export.contexts.items()},
        }
        for export in (DISK, PLAIN)
    ]
    assert CASES.keys() == CALLS.keys()


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
