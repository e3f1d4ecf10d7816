"""What each query answers on both programs: the same members, of the same types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd.qmp.commands import COMMANDS
from tests.helpers.busy_daemon import BusyDaemon
from tests.helpers.daemon import Daemon
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient
from tests.helpers.qmp_mistakes import least
from tests.helpers.tools import require_tool

QUESTIONS = [
    command.name
    for command in COMMANDS
    if command.name.startswith("query-") and not least(command.declaration)
]

#: Answers that are meant to differ in what they hold, and why.
DIFFERENCES = {
    "query-qmp-schema": "it tells what there is, which is not the same; its form is tested apart",
}


def leave(daemon: BusyDaemon) -> None:
    """Make everything, and end it."""
    daemon.fill()
    for job in daemon.execute("query-jobs"):
        verb = "dismiss" if job["status"] == "concluded" else "cancel"
        daemon.execute(f"job-{verb}", {"id": job["id"]})
    daemon.execute("nbd-server-stop")


#: What is to be seen, by how it is brought about.
SITUATIONS: dict[str, Callable[[BusyDaemon], None]] = {
    "nothing": lambda daemon: None,
    "one of everything": BusyDaemon.fill,
    "after it": leave,
}


def shape(value: Any, where: str = "") -> dict[str, set[str]]:
    """The types of all that is in an answer, by where it is; of a list, of all its items."""
    found: dict[str, set[str]] = {where: {type(value).__name__}}
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{where}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list):
        inner = [(f"{where}[]", item) for item in value if not is_filter(item)]
    for place, item in inner:
        for path, types in shape(item, place).items():
            found.setdefault(path, set()).update(types)
    return found


def is_filter(value: Any) -> bool:
    """The peer lists a node of its own making over the source of each backup; we have none."""
    return isinstance(value, dict) and (
        value.get("drv") == "copy-before-write"
        or value.get("driver-specific", {}).get("driver") == "copy-before-write"
    )


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[BusyDaemon, BusyDaemon]]:
    require_tool("qemu-storage-daemon")
    directories = tmp_path / "ours", tmp_path / "peers"
    for directory in directories:
        directory.mkdir()
    ours, peer = Daemon(directories[0]), Peer(directories[1])
    ours.start()
    with QmpClient(peer.start()) as theirs, QmpClient(ours.qmp_path) as mine:
        yield BusyDaemon(mine, directories[0]), BusyDaemon(theirs, directories[1])
    ours.kill()
    peer.kill()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_answers_have_the_peers_members(
    situation: str, both: tuple[BusyDaemon, BusyDaemon]
) -> None:
    for daemon in both:
        SITUATIONS[situation](daemon)
    there = {command["name"] for command in both[1].execute("query-commands")}
    for question in QUESTIONS:
        if question in there and question not in DIFFERENCES:
            ours, theirs = (shape(daemon.execute(question)) for daemon in both)
            assert ours == theirs, question
