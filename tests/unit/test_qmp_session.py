"""What a client may say when, and how a message must look."""

from __future__ import annotations

from typing import Any

import pytest

from blockd import __version__
from blockd.errors import BlockdError, CommandNotFoundError
from blockd.qmp.session import GREETING, NEGOTIATION, Request, Session, parse_request

# -- the greeting ------------------------------------------------------------------------------


def test_the_greeting_has_the_peers_shape() -> None:
    version = {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": f"blockd {__version__}"}
    assert dict(GREETING) == {"QMP": {"version": version, "capabilities": []}}


# -- the envelope ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ({"execute": "quit"}, Request("quit", {})),
        ({"execute": "quit", "id": 1}, Request("quit", {})),
        ({"execute": "x", "arguments": {"a": [1]}}, Request("x", {"a": [1]})),
        ({"id": None, "arguments": {}, "execute": ""}, Request("", {})),
    ],
)
def test_a_request(message: dict[str, Any], request_: Request) -> None:
    assert parse_request(message) == request_


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([], "QMP input must be a JSON object"),
        ("quit", "QMP input must be a JSON object"),
        (5, "QMP input must be a JSON object"),
        (None, "QMP input must be a JSON object"),
        ({}, "QMP input lacks member 'execute'"),
        ({"id": 1}, "QMP input lacks member 'execute'"),
        ({"arguments": {}}, "QMP input lacks member 'execute'"),
        ({"execute": None}, "QMP input member 'execute' must be a string"),
        ({"execute": ["quit"]}, "QMP input member 'execute' must be a string"),
        ({"execute": "x", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "arguments": None}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "Arguments": {}}, "QMP input member 'Arguments' is unexpected"),
        # Out of band execution is not offered.
        ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_no_request(message: object, error: str) -> None:
    with pytest.raises(BlockdError) as refused:
        parse_request(message)
    assert type(refused.value) is BlockdError
    assert refused.value.message == error


# -- the phases --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query-version", "no-such-command", "quit", ""])
def test_before_the_negotiation_nothing_else_is_taken(name: str) -> None:
    session = Session()
    with pytest.raises(CommandNotFoundError) as refused:
        session.admit(name)
    assert refused.value.message == "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert not session.negotiated


def test_a_session() -> None:
    session = Session()
    session.admit(NEGOTIATION)
    assert not session.negotiated
    session.negotiate([])
    assert session.negotiated
    # Whether there is such a command is not the session's question.
    session.admit("no-such-command")


def test_the_negotiation_is_over_once() -> None:
    session = Session()
    session.negotiate([])
    with pytest.raises(CommandNotFoundError) as refused:
        session.admit(NEGOTIATION)
    assert refused.value.message == "Capabilities negotiation is already complete, command ignored"
    assert session.negotiated


@pytest.mark.parametrize("wanted", [["oob"], ["anything"]])
def test_a_capability_that_is_not_offered_is_refused_and_one_may_try_again(
    wanted: list[str],
) -> None:
    session = Session()
    with pytest.raises(BlockdError):
        session.negotiate(wanted)
    session.admit(NEGOTIATION)
    session.negotiate([])
    assert session.negotiated
