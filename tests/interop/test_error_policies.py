"""The peer does about errors what the table says that ours is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockd.job import OnError
from tests.helpers.error_policies import IO_STATUS, POLICIES, events_of, told
from tests.helpers.peer import Peer
from tests.helpers.scenario import Do, Scenario, Step, do
from tests.helpers.tidy import Message
from tests.interop.words import ENDED, backup, file, node, status

SECTOR_OF_1_MIB = 2048


def failing_node(name: str, operation: str, number: int) -> Do:
    """The raw node ``name`` of which the first read, or write, at 1 MiB fails."""
    fault = {"event": "none", "iotype": operation, "errno": number, "sector": SECTOR_OF_1_MIB}
    image = {"image": file(f"{name}.img"), "inject-error": [{**fault, "once": True}]}
    return node(name, file={"driver": "blkdebug", **image})


@pytest.mark.parametrize(("number", "policy", "action"), POLICIES)
@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_error_that_passes(
    operation: str, number: int, policy: OnError, action: str, tmp_path: Path
) -> None:
    source = failing_node("n", "read", number) if operation == "read" else node("n")
    target = failing_node("t", "write", number) if operation == "write" else node("t")
    policies = {"on_source_error": policy.value, "on_target_error": policy.value}
    pause: list[Step] = [status("paused"), do("query-block-jobs"), do("job-resume", id="j")]
    steps = [*(pause if action == "stop" else []), ENDED]
    directory = tmp_path / "files"
    directory.mkdir()
    story = Scenario("story", [source, target, backup(**policies), *steps])
    played = story.play(Peer(tmp_path), directory)[3 : 3 + len(steps)]
    assert told(events(played)) == events_of(operation, number, action)
    if action == "stop":
        (job,) = played[1][0]["return"]
        assert (job["io-status"], job["paused"], job["status"]) == (
            IO_STATUS[number],
            True,
            "paused",
        )


def events(played: list[list[Message]]) -> list[tuple[str, dict[str, Any]]]:
    return [(item["event"], item["data"]) for items in played for item in items if "event" in item]
