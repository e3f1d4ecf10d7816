"""drive-backup to qcow2 files, beside what the peer says; what is in them is compared elsewhere."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import MIB, Asleep, Content, Do, Scenario, Step, do
from tests.interop.scenarios.create import created
from tests.interop.words import ENDED, backup, delete, drive_backup, file, node


def to_qcow2(**options: Any) -> Do:
    new = {"target": "DIR/new.q", "mode": "absolute-paths", "format": "qcow2"}
    return drive_backup(**{**new, **options})


def image(name: str, **options: Any) -> list[Step]:
    """A new qcow2 image NAME.q of the disk's size, as the node NAME."""
    place = file(f"{name}.q")
    return [
        *created(driver="file", filename=f"DIR/{name}.q", size=0),
        *created(driver="qcow2", file=place, size=3 * MIB, **options),
        do("blockdev-add", driver="qcow2", node_name=name, file=place),
    ]


SCENARIOS = [
    Scenario(
        "qcow2-backup-new",
        [node("n"), to_qcow2(), ENDED, to_qcow2(compress=True), ENDED, to_qcow2(sync="top"), ENDED],
    ),
    Scenario(
        "qcow2-backup-existing",
        [
            *image("t"),
            delete("t"),
            node("n"),
            to_qcow2(target="DIR/t.q", mode="existing"),
            ENDED,
            to_qcow2(target="DIR/m.img", mode="existing"),
            to_qcow2(target="DIR/none.q", mode="existing"),
        ],
    ),
    Scenario(
        "qcow2-backup-to-a-node",
        [node("n"), *image("q"), backup(target="q", compress=True), ENDED, delete("q")],
    ),
    Scenario(
        "qcow2-backup-none",
        [
            node("n"),
            to_qcow2(sync="none"),
            do("job-cancel", id="j"),
            to_qcow2(sync="none", format="raw"),
            Content("n.img"),
        ],
    ),
    Scenario(
        "qcow2-backup-slow",
        [
            node("n"),
            to_qcow2(speed=1),
            Asleep(),
            do("job-cancel", id="j"),
        ],
    ),
    Scenario(
        "qcow2-backup-compressed-through-filters",
        [
            node("n"),
            *image("q", compression_type="zstd"),
            do("object-add", qom_type="throttle-group", id="g"),
            *(
                step
                for options in (
                    {"driver": "throttle", "throttle_group": "g", "file": "q"},
                    {"driver": "copy-on-read", "file": "q"},
                )
                for step in (
                    do("blockdev-add", node_name="f", **options),
                    backup(target="f", compress=True),
                    ENDED,
                    delete("f"),
                )
            ),
            do("blockdev-add", node_name="f", driver="raw", file="q"),
            backup(target="f", compress=True),
            delete("f"),
            delete("q"),
        ],
    ),
]
