"""Every command with every kind of bad input: what the peer says, and nothing has changed.

The input is made from the table of commands and their declarations. Both programs have one of
everything in them (``busy_daemon``).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Command
from tests.helpers.busy_daemon import BusyDaemon
from tests.helpers.daemon import Daemon
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient
from tests.helpers.qmp_mistakes import least, mistakes
from tests.helpers.qmp_names import wrong_names
from tests.helpers.tools import require_tool

#: What ``query-`` commands tell of the daemon itself, which no command changes.
CONSTANT = {"query-qmp-schema", "query-commands", "query-version"}
#: Commands that change nothing.
READS = ("query-", "x-debug-")
QUESTIONS = [
    command.name
    for command in COMMANDS
    if command.name.startswith("query-")
    and command.name not in CONSTANT
    and not least(command.declaration)
]

#: So much of what is tried may be carried out after all, each time with a new start. If it is
#: more, ``qmp_names`` needs to know the command better.
MAX_CARRIED_OUT = 20

#: The class and description of a refusal; None: it was carried out.
Refusal = tuple[str, str] | None


@dataclass(frozen=True)
class Difference:
    """Refusals of commands, told by a pattern, that are meant to differ; and by what sentences.

    ``peers`` None: there the command is carried out.
    """

    command: str
    ours: str
    peers: str | None
    why: str

    def covers(self, command: str, ours: Refusal, theirs: Refusal) -> bool:
        return (
            fnmatchcase(command, self.command)
            and _matches(self.ours, ours)
            and _matches(self.peers, theirs)
        )


def _matches(pattern: str | None, refusal: Refusal) -> bool:
    if pattern is None or refusal is None:
        return pattern is None and refusal is None
    return re.fullmatch(pattern, refusal[1]) is not None


DIFFERENCES = [
    Difference(
        "block-dirty-bitmap-add",
        r"Can't store persistent bitmaps to .*: start blockd with --state-dir",
        r"Can't store persistent bitmaps to .*: Operation not supported",
        "the peer knows no way out",
    ),
    Difference(
        "drive-backup",
        r"Failed to get \"write\" lock.*",
        r"Driver 'raw' of node '#block' does not support backing files|Job ID .*|Invalid job ID .*"
        r"|must provide .*|Bitmap .*|sync mode .*|Cannot specify .*|Node '.*' is busy.*"
        r"|Failed to get \"resize\" lock",
        "a file that a node stands on is no target, whatever else is wrong",
    ),
    Difference(
        "transaction",
        r"Invalid parameter type for 'dry-run', .*",
        r"Parameter 'dry-run' is unexpected",
        "the peer has no dry run",
    ),
    Difference(
        "*",
        r"Parameter '.*' expects uint64",
        r"(?!Parameter|Invalid parameter).*",
        "a negative number is a mistake; the peer takes it for a very large one",
    ),
    Difference(
        "blockdev-create",
        r"Parameter '.*' expects uint64",
        None,
        "the same; the peer's job fails then, or takes a very large size",
    ),
    Difference(
        "object-add",
        r".*",
        r"invalid object type: authz-listfile",
        "the storage daemon is built without it, QEMU has it",
    ),
    Difference(
        "blockdev-snapshot-sync",
        r"Invalid node-name: '.*'|Duplicate nodes with node-name='.*'|Node name too long",
        r"Could not create '.*': .*|Could not open '.*': .*",
        "no file is made for an overlay that can't be called so",
    ),
    Difference(
        "block_resize",
        r"Permission conflict on node 'src': .* unshared by block job 'running' .*",
        r"Permission conflict on node 'src': .* unshared by node '#block' .*",
        "no filter is over a disk that is being backed up",
    ),
]


class Pair:
    """Both programs, started anew as often as something was carried out after all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starts = 0
        self.seen: set[Difference] = set()
        self._start()

    def _start(self) -> None:
        self._starts += 1
        ours, theirs = (self._directory / f"{name}{self._starts}" for name in ("ours", "peers"))
        for directory in (ours, theirs):
            directory.mkdir()
        self._programs = Daemon(ours), Peer(theirs)
        self._programs[0].start()
        self.ours = BusyDaemon(QmpClient(self._programs[0].qmp_path), ours)
        self.theirs = BusyDaemon(QmpClient(self._programs[1].start()), theirs)
        self.ours.fill()
        self.theirs.fill()
        self.commands_of_peer = {each["name"] for each in self.theirs.execute("query-commands")}
        self.before = self.ours.everything(QUESTIONS)

    def end(self) -> None:
        self.ours.client.close()
        self.theirs.client.close()
        for program in self._programs:
            program.kill()
        assert "Traceback" not in self._programs[0].log()
        for daemon in (self.ours, self.theirs):
            shutil.rmtree(daemon.directory)

    def try_all(self, command: str, all_arguments: Iterable[dict[str, Any]]) -> int:
        """Try each on both; how many were carried out."""
        carried_out = 0
        for arguments in all_arguments:
            ours = self.ours.answer(command, arguments)
            theirs = ours
            if command in self.commands_of_peer:
                theirs = self.theirs.answer(command, arguments)
                self._compare(command, arguments, ours, theirs)
            if ours is not None:
                assert self.ours.everything(QUESTIONS) == self.before, arguments
            else:
                carried_out += 1
                assert carried_out <= MAX_CARRIED_OUT, arguments
            if None in (ours, theirs) and not command.startswith(READS):
                self.end()
                self._start()
        return carried_out

    def _compare(
        self, command: str, arguments: dict[str, Any], ours: Refusal, theirs: Refusal
    ) -> None:
        if ours == theirs:
            return
        for difference in DIFFERENCES:
            if difference.covers(command, ours, theirs):
                self.seen.add(difference)
                return
        raise AssertionError(f"{command} {arguments}\nours: {ours}\npeer: {theirs}")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    require_tool("qemu-storage-daemon")
    pair = Pair(tmp_path_factory.mktemp("bad-input"))
    yield pair
    pair.end()


each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


@each_command
def test_no_command_takes_arguments_that_are_not_as_declared(command: Command, pair: Pair) -> None:
    wrong = (mistake.arguments for mistake in mistakes(command.declaration))
    assert pair.try_all(command.name, wrong) == 0


@each_command
def test_names_and_states(command: Command, pair: Pair) -> None:
    if command.name != "quit":
        pair.try_all(command.name, wrong_names(command.name, command.declaration))


def test_every_difference_is_one(pair: Pair) -> None:
    """One that the tests above, which ran before if they ran, did not meet must leave the table."""
    unseen = [difference for difference in DIFFERENCES if difference not in pair.seen]
    for command in COMMANDS:
        if any(fnmatchcase(command.name, difference.command) for difference in unseen):
            wrong = (mistake.arguments for mistake in mistakes(command.declaration))
            pair.try_all(command.name, wrong)
            pair.try_all(command.name, wrong_names(command.name, command.declaration))
    assert pair.seen == set(DIFFERENCES)
