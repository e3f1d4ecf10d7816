"""The published transcripts, played on qemu-storage-daemon: a client can't tell the difference."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.peer import Peer
from tests.helpers.qmp_lines import Lines
from tests.helpers.tools import require_tool
from tests.helpers.transcript import Player, fits, read, text_of

TRANSCRIPTS = Path(__file__).parents[2] / "protocol" / "transcripts"
#: How a transcript begins that tells of blockd alone, and says why.
OWN = "\n# Only blockd's: "

#: More clients than any transcript has, with those who only look.
MONITORS = 4


class Monitors:
    """A run of the peer, which takes its clients before it starts."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.wait = peer.wait
        self._unused = [Lines(each) for each in peer.start_with_monitors(MONITORS)]

    @property
    def pid(self) -> int:
        return self._peer.pid

    def connect(self) -> Lines:
        return self._unused.pop()

    def close(self) -> None:
        for each in self._unused:
            each.close()


class Patient(Player):
    """Takes replies in their order and events in theirs, but not the one between the other.

    That is what the peer promises. Pauses which it makes for its own ends are passed over.
    """

    def __init__(self, program: Monitors, directory: Path) -> None:
        super().__init__(program, directory)
        self._early: dict[Lines, deque[dict[str, Any]]] = {}

    def receive(self, client: Lines, expected: dict[str, Any]) -> dict[str, Any]:
        early = self._early.setdefault(client, deque())
        for message in list(early):
            if ("event" in message) == ("event" in expected):
                early.remove(message)
                if not self._is_noise(message, expected):
                    return message
        while True:
            message = client.receive()
            if ("event" in message) != ("event" in expected):
                early.append(message)
            elif not self._is_noise(message, expected):
                return message

    def _is_noise(self, message: dict[str, Any], expected: dict[str, Any]) -> bool:
        return is_pause(message) and not fits(expected, message, str(self.directory))

    def untold(self) -> list[dict[str, Any]]:
        """What came early, and was never told of."""
        return [
            message for early in self._early.values() for message in early if not is_pause(message)
        ]


def is_pause(message: dict[str, Any]) -> bool:
    """Whether it may be one of the pauses that no client asked for."""
    return message.get("event") == "JOB_STATUS_CHANGE" and message["data"]["status"] in {
        "paused",
        "running",
    }


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Monitors]:
    require_tool("qemu-storage-daemon")
    peer = Peer(tmp_path)
    with closing(Monitors(peer)) as monitors:
        yield monitors
    peer.kill()


def of_both() -> list[Path]:
    return [path for path in sorted(TRANSCRIPTS.glob("*.txt")) if OWN not in path.read_text()]


@pytest.mark.parametrize("path", of_both(), ids=lambda path: path.stem)
def test_the_peer_says_the_same(path: Path, program: Monitors, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    told = read(path)
    with closing(Patient(program, directory)) as player:
        played = player.play(told)
        assert player.untold() == []
    assert text_of(played[: len(told)]) == text_of(told)
    assert [line for line in played[len(told) :] if not is_pause(json.loads(line.body))] == []
