"""block-set-write-threshold, and its event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.helpers.scenario import (
    DISK_BYTES,
    MIB,
    Differs,
    Do,
    FileSizeLimit,
    Scenario,
    Stage,
    Until,
    Write,
    do,
)
from tests.helpers.tidy import Message
from tests.interop.words import (
    DISKS,
    ENDED,
    GUEST_DISKS,
    backup,
    bitmap,
    export,
    file,
    node,
    refused,
    server,
    slow_backup,
)

EXCEEDED = Until("BLOCK_WRITE_THRESHOLD")


def threshold(name: Any, value: Any, **options: Any) -> Do:
    return do("block-set-write-threshold", node_name=name, write_threshold=value, **options)


@dataclass(frozen=True)
class Thresholds:
    """Those of all nodes."""

    def play(self, stage: Stage) -> list[Message]:
        *events, reply = do("query-named-block-nodes").play(stage)
        return [*events, *[{n["node-name"]: n["write_threshold"]} for n in reply["return"]]]


SCENARIOS = [
    Scenario(
        "threshold-arguments",
        [
            node("n"),
            threshold("nope", 1),
            threshold(3, 1),
            threshold("n", 1, wat=1),
            do("block-set-write-threshold"),
            do("block-set-write-threshold", node_name="n"),
            *[
                step
                for value in (5, 0, 2**63 - 1, 2**63, 2**64 - 1, 2**64, "1", 1.0)
                for step in (threshold("n", value), Thresholds())
            ],
            Differs(
                threshold("n", -1),
                "for the peer it is the largest number",
                refused("Parameter 'write-threshold' expects uint64"),
            ),
            threshold("n", 0),
            node("m", read_only=True),
            threshold("m", 7),
            Thresholds(),
        ],
    ),
    Scenario(
        "threshold-is-exceeded-once",
        [
            *GUEST_DISKS,
            threshold("n", MIB),
            Write("n", 0, MIB),
            Thresholds(),
            Write("n", MIB - 512, 513),
            EXCEEDED,
            Thresholds(),
            Write("n", 2 * MIB, 512),
            threshold("n", MIB),
            threshold("n", 512),
            Write("n", 512, 1),
            EXCEEDED,
            threshold("n", 512),
            threshold("n", 0),
            Write("n", 512, 1),
            threshold("n", 2**63),
            Write("n", 512, 1),
            Thresholds(),
        ],
    ),
    Scenario(
        "threshold-of-each-node-below",
        [
            do("blockdev-add", node_name="f", **file("n.img")),
            node("n", file="f", offset=4096),
            server(),
            export("e", writable=True),
            threshold("n", MIB),
            threshold("f", MIB),
            Write("n", MIB - 512, 512),
            EXCEEDED,
            Thresholds(),
            threshold("f", 2 * MIB),
            Write("n", 2 * MIB, 512),
            EXCEEDED,
            EXCEEDED,
            Thresholds(),
        ],
    ),
    Scenario(
        "threshold-and-a-write-that-is-refused",
        [
            *GUEST_DISKS,
            threshold("n", MIB),
            FileSizeLimit(MIB),
            Write("n", 2 * MIB, 512),
            EXCEEDED,
            Thresholds(),
        ],
    ),
    Scenario(
        "threshold-under-a-backup",
        [
            *GUEST_DISKS,
            bitmap("b"),
            threshold("n", MIB),
            *slow_backup(),
            Write("n", 2 * MIB, 512),
            EXCEEDED,
            Thresholds(),
            do("job-cancel", id="j"),
        ],
    ),
    Scenario(
        "threshold-of-a-target",
        [*DISKS, threshold("t", DISK_BYTES - 1), backup(), ENDED, Thresholds()],
    ),
]
