"""Damaged images: what is told of them, and what can be done with them then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.helpers.qcow2_damage import (
    Damage,
    first_data,
    first_l2_table,
    first_refcount_block,
    make_damaged,
)
from tests.helpers.scenario import MIB, Both, Differs, Read, Scenario, Stage, Step, Until, Write, do
from tests.helpers.tidy import Message
from tests.interop.words import CLUSTER, delete, export, file, refused, server, unexport


@dataclass(frozen=True)
class Damaged:
    """Makes d.q, an image with its first 256 KiB allocated, and damages it."""

    damage: Damage

    def play(self, stage: Stage) -> list[Message]:
        make_damaged(stage.directory / "d.q", self.damage)
        return []


def add(name: str = "d", **options: Any) -> Step:
    return do("blockdev-add", driver="qcow2", node_name=name, file=file("d.q"), **options)


TOLD = Until("BLOCK_IMAGE_CORRUPTED")


def _fails(step: Step, answer: str) -> Step:
    return Differs(
        step, "the peer takes the medium out, for which NBD has no error", [{answer: "EIO"}]
    )


def fatal(name: str, damage: Damage, finds: Step) -> Scenario:
    """A writable image: nothing is done with it any more, until it is repaired."""
    return Scenario(
        f"corrupt-{name}",
        [
            Damaged(damage),
            add(),
            server(),
            export("e", "d", writable=True),
            finds,
            TOLD,
            _fails(Read("d", 2 * CLUSTER, 512), "read"),
            _fails(Write("d", 2 * CLUSTER, 512), "guest"),
            Both(unexport("e", mode="hard"), Until("BLOCK_EXPORT_DELETED")),
            Differs(
                delete("d"),
                "the node is gone, but what was written last may not be there",
                refused("Input/output error"),
            ),
            add(),
            add(read_only=True),
        ],
    )


SCENARIOS = [
    fatal("data-read", first_data, Read("d", 0, 4096)),
    fatal("data-written", first_data, Write("d", 0, 4096)),
    fatal("l2-table", first_l2_table, Write("d", 0, 4096)),
    fatal("refcount-block", first_refcount_block, Write("d", MIB, CLUSTER)),
    Scenario(
        "corrupt-read-only",
        [
            Damaged(first_data),
            add(read_only=True),
            server(),
            export("e", "d"),
            Read("d", 0, 4096),
            TOLD,
            Read("d", 0, 4096),
            Read("d", 2 * CLUSTER, 512),
        ],
    ),
]
