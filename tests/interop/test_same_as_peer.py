"""The same stories on blockd and on qemu-storage-daemon: replies and events must be the same."""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.peer import Peer
from tests.helpers.scenario import Differs, Scenario, Step, do
from tests.helpers.tidy import Message
from tests.helpers.tools import require_tool
from tests.interop import scenarios

SCENARIOS: list[Scenario] = [
    scenario
    for module in iter_modules(scenarios.__path__, f"{scenarios.__name__}.")
    for scenario in import_module(module.name).SCENARIOS
]


class Ours:
    """blockd, with the handles of Peer."""

    def __init__(self, directory: Path) -> None:
        self._daemon = Daemon(directory)
        self.kill = self._daemon.kill
        self.wait = self._daemon.wait

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def start(self) -> socket.socket:
        self._daemon.start()
        monitor = socket.socket(socket.AF_UNIX)
        monitor.connect(str(self._daemon.qmp_path))
        return monitor


def directory(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def expected(step: Step, theirs: list[Message]) -> list[Message]:
    """What ours must give in ``step``. A difference that is none any more must leave the table."""
    if not isinstance(step, Differs):
        return theirs
    assert theirs != step.ours, f"no difference any more: {step.why}"
    return step.ours


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_same_as_peer(scenario: Scenario, tmp_path: Path) -> None:
    require_tool("qemu-storage-daemon")
    theirs = scenario.play(Peer(tmp_path / "peer"), directory(tmp_path, "peer"))
    ours = scenario.play(Ours(tmp_path / "ours"), directory(tmp_path, "ours"))
    for step, their_items, our_items in zip(scenario.all_steps(), theirs, ours, strict=True):
        assert our_items == expected(step, their_items), step
    assert "Traceback" not in (tmp_path / "ours" / "blockd.log").read_text()


#: Those that the peer does not have; no other name begins like this.
OWN_COMMANDS = "x-blockd-"


def test_every_command_of_ours_is_one_of_the_peers(tmp_path: Path) -> None:
    require_tool("qemu-storage-daemon")
    ask = Scenario("ask", [do("query-commands")])
    theirs = ask.play(Peer(tmp_path / "peer"), directory(tmp_path, "peer"))[0][0]["return"]
    ours = ask.play(Ours(tmp_path / "ours"), directory(tmp_path, "ours"))[0][0]["return"]
    names = {command["name"] for command in ours}
    own = {name for name in names if name.startswith(OWN_COMMANDS)}
    assert own == {"x-blockd-audit"}
    assert names - own <= {command["name"] for command in theirs}
    assert all(command.keys() == {"name"} for command in ours)


def test_names_differ() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
