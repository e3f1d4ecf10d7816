"""The state tables that are published, and those that the daemon goes by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from blockd.job import MAY, NEXT, Status
from blockd.qmp.commands import COMMANDS
from blockd.qmp.types.job import JobStatus

STATES = Path(__file__).parents[2] / "protocol" / "states"


def sets(table: Mapping[Any, Iterable[str]]) -> dict[str, set[str]]:
    return {str(row): {str(state) for state in states} for row, states in table.items()}


def test_a_job_goes_through_the_states_that_are_published() -> None:
    published = json.loads((STATES / "job.json").read_text())
    assert sets(published["next"]) == sets(NEXT)
    assert sets(published["may"]) == sets(MAY)


def test_every_command_to_a_job_has_its_verb() -> None:
    published = json.loads((STATES / "job.json").read_text())
    assert published["commands"].keys() == published["may"].keys()
    commands = [name for names in published["commands"].values() for name in names]
    assert sorted(commands) == sorted(
        command.name for command in COMMANDS if command.name.startswith(("job-", "block-job-"))
    )


def test_the_states_that_commands_and_events_tell_are_those() -> None:
    assert get_args(JobStatus) == tuple(status.value for status in Status)
