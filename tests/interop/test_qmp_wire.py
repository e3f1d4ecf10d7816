"""What is no command, on both programs: out of band execution, and how each gets back into step."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.peer import Peer

NEGOTIATE = b'{"execute": "qmp_capabilities"}'
LAST = {"return": [], "id": "last"}


class Wire:
    """A monitor's socket, raw."""

    def __init__(self, monitor: socket.socket) -> None:
        monitor.settimeout(PATIENCE_SECONDS)
        self._monitor = monitor
        self._lines = monitor.makefile("rb")
        self.greeting = self.next()

    def next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._lines.readline())
        return message

    def ask(self, data: bytes) -> list[dict[str, Any]]:
        """All that comes of ``data``, up to the answer to a last command, which is right."""
        self._monitor.sendall(data + b'{"execute": "query-block", "id": "last"}')
        answers = []
        while (answer := self.next()) != LAST:
            answers.append(answer)
        return answers

    def close(self) -> None:
        self._lines.close()
        self._monitor.close()


@pytest.fixture
def both(tmp_path: Path, daemon: Daemon) -> Iterator[tuple[Wire, Wire]]:
    """The peer and blockd."""
    program = Peer(tmp_path)
    ours = socket.socket(socket.AF_UNIX)
    ours.connect(str(daemon.qmp_path))
    wires = Wire(program.start()), Wire(ours)
    yield wires
    for wire in wires:
        wire.close()
    program.kill()


def one(wire: Wire, data: bytes) -> dict[str, Any]:
    wire._monitor.sendall(data)
    return wire.next()


def test_the_greeting_is_the_peer_s_without_out_of_band(both: tuple[Wire, Wire]) -> None:
    peer, ours = (wire.greeting["QMP"] for wire in both)
    assert peer["capabilities"] == ["oob"]
    assert ours["capabilities"] == []
    assert ours["version"]["qemu"] == peer["version"]["qemu"]


def test_out_of_band_is_refused_as_by_a_peer_that_did_not_enable_it(
    both: tuple[Wire, Wire],
) -> None:
    before = [
        b'{"exec-oob": "query-block"}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["wat"]}}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": [3]}}',
        b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}',
    ]
    after = [
        b'{"exec-oob": "query-block"}',
        b'{"exec-oob": "no-such-command", "id": 1}',
        b'{"exec-oob": 5}',
        b'{"exec-oob": "query-block", "execute": "query-block"}',
        b'{"execute": "query-block", "exec-oob": "query-block"}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}',
    ]
    for request in (*before, NEGOTIATE, *after):
        theirs, ours = (one(wire, request) for wire in both)
        assert ours == theirs, request


#: No daemon has a command in these. A byte that JSON has no place for ends each, whatever is open.
GARBAGE = [
    b"{" * 200_000 + b"\xff",
    b"[" * 200_000 + b"\x01",
    b'{"a":' * 50_000 + b"\xff",
    b'{"execute": "quit\n',
    b'{"execute": "quit',
    b"{'execute': 'quit\\",
    b'"' + b"x" * 1000 + b"\n",
    b"\xff" * 100,
    b"\x00\x01\x02",
    b"}" * 100,
    b"]{}[",
    b"nonsense\xff",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_after_garbage_both_are_in_step_again(both: tuple[Wire, Wire], garbage: bytes) -> None:
    for wire in both:
        assert one(wire, NEGOTIATE) == {"return": {}}
        answers = wire.ask(garbage + b"\xff")
        assert answers
        assert {answer["error"]["class"] for answer in answers} == {"GenericError"}
