"""The rarer options of backups: what is refused, in which order, and what they do."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    MIB,
    Asleep,
    Bitmaps,
    Content,
    Differs,
    Do,
    Scenario,
    Step,
    Write,
    do,
)
from tests.interop.words import (
    CLUSTER,
    DISKS,
    ENDED,
    GUEST_DISKS,
    TWO_WRITES,
    backup,
    bitmap,
    delete,
    drive_backup,
    export,
    node,
    refused,
    server,
    slow_backup,
    unexport,
)

CANCEL = do("block-job-cancel", device="j")
QUERY = do("query-named-block-nodes")
NEW: dict[str, Any] = {"mode": "absolute-paths", "target": "DIR/new"}


def tuned(perf: Any, **options: Any) -> Do:
    return backup(x_perf=perf, **options)


def second(**options: Any) -> Do:
    """A backup to ``u`` as job ``k``."""
    return backup(**{"job_id": "k", "target": "u", **options})


def too_large(cluster_bytes: int) -> Step:
    return Differs(
        tuned({"min-cluster-size": cluster_bytes}, speed=-1),
        "ours bounds the memory that one cluster takes",
        refused(f"min-cluster-size too large: {cluster_bytes} > {16 * MIB}"),
    )


def conflict(writer: str, role: str) -> Step:
    return Differs(
        backup(),
        "ours makes no job of it",
        refused(
            "Permission conflict on node 'nf': permissions 'write' are both required by "
            f"{writer} (uses node 'nf' as '{role}' child) and unshared by node 'n' "
            "(uses node 'nf' as 'file' child)."
        ),
    )


#: Nodes ``n`` and ``t`` over file nodes ``nf`` and ``tf``.
NAMED_FILES: list[Step] = [
    do("blockdev-add", driver="file", node_name="nf", filename="DIR/n.img"),
    node("n", file="nf"),
    do("blockdev-add", driver="file", node_name="tf", filename="DIR/t.img"),
    node("t", file="tf"),
]

SCENARIOS = [
    Scenario(
        "backup-perf-refused",
        [
            *DISKS,
            *[tuned({"max-workers": bad}) for bad in (0, -1, 1 << 31, (1 << 63) - 1, "1", None)],
            *[tuned({"max-chunk": bad}) for bad in (-1, 1, 1000, 65535, "1", 1.5)],
            *[tuned({"min-cluster-size": bad}) for bad in (1000, 3, 65537, "1", None, 1 << 64)],
            Differs(
                tuned({"min-cluster-size": -1}),
                "the peer reads it as a large number",
                refused("Parameter 'x-perf.min-cluster-size' expects uint64"),
            ),
            too_large(1 << 31),
            too_large((1 << 64) - 1),
            tuned({"max-chunk": 100000, "min-cluster-size": 131072}),
            tuned({"use-copy-range": 1}),
            tuned({"max-workers": "1", "use-copy-range": 1}),
            tuned({"wat": 1}),
            tuned(3),
        ],
    ),
    *[
        Scenario(f"backup-perf-taken-{name}", [*DISKS, tuned(perf), ENDED, Content("t.img")])
        for name, perf in [
            ("nothing", {}),
            ("copy-range", {"use-copy-range": True}),
            ("one-worker", {"max-workers": 1}),
            ("many-workers", {"max-workers": (1 << 31) - 1}),
            ("no-chunk", {"max-chunk": 0}),
            ("odd-chunk", {"max-chunk": 65537}),
            ("huge-chunk", {"max-chunk": (1 << 63) - 1}),
            ("small-cluster", {"min-cluster-size": 1}),
            ("large-cluster", {"min-cluster-size": 4 * MIB, "max-chunk": 4 * MIB}),
        ]
    ],
    Scenario(
        "backup-options-refused-in-order",
        [
            *DISKS,
            node("u"),
            node("small"),
            node("m", read_only=True),
            backup(compress=True, target="n"),
            backup(compress=True, sync="bitmap"),
            backup(compress=True, target="small"),
            tuned({"max-workers": 0}, compress=True),
            tuned({"max-workers": 0}, target="n"),
            tuned({"max-workers": 0}, target="small"),
            tuned({"max-workers": 0, "max-chunk": -1}, target="small"),
            tuned({"max-chunk": -1}, target="small"),
            tuned({"max-chunk": -1}, job_id="1"),
            tuned({"min-cluster-size": 1000}, target="small"),
            tuned({"max-chunk": 1000}, target="small"),
            backup(filter_node_name="1", target="small"),
            backup(filter_node_name="1", target="m"),
            backup(filter_node_name="f", target="m"),
            tuned({"min-cluster-size": 1000}, target="m"),
            tuned({"min-cluster-size": 1000}, filter_node_name="1"),
            tuned({"min-cluster-size": 1000, "max-chunk": 1000}),
            tuned({"min-cluster-size": 1000}, job_id="1"),
            tuned({"max-chunk": 1000}, job_id="1"),
            backup(filter_node_name="1", job_id="1"),
            tuned({}, job_id="1", speed=-1),
            tuned({"max-chunk": 65537}, speed=-1),
            backup(speed=1),
            Asleep(),
            tuned({"max-workers": 0}, job_id="k"),
            tuned({"max-workers": 0}, job_id="k", target="u"),
            backup(compress=True, job_id="k"),
            backup(job_id="k", device="t", target="u", filter_node_name="1"),
            tuned({"max-chunk": 1000}, target="u"),
            backup(filter_node_name="1", target="u"),
            backup(target="u"),
            CANCEL,
        ],
    ),
    Scenario(
        "backup-of-a-busy-bitmap-refused-in-order",
        [
            *GUEST_DISKS,
            node("u"),
            node("small"),
            bitmap("b"),
            *TWO_WRITES,
            *slow_backup(sync="incremental", bitmap="b"),
            second(bitmap="b", sync="bitmap"),
            second(bitmap="b", sync="incremental", bitmap_mode="never"),
            *[
                second(bitmap="b", bitmap_mode=mode, sync=sync)
                for sync in ("bitmap", "full", "top", "none")
                for mode in ("on-success", "always", "never")
            ],
            second(bitmap="b", sync="incremental", target="n"),
            second(bitmap="b", sync="incremental", target="t"),
            second(bitmap="b", sync="incremental", compress=True),
            second(bitmap="b", sync="incremental", target="small", x_perf={"max-workers": 0}),
            second(bitmap="b", sync="incremental", target="small"),
            CANCEL,
        ],
    ),
    Scenario(
        "backup-compressed-is-refused",
        [
            *DISKS,
            backup(compress=True),
            backup(compress=3),
            drive_backup(target="DIR/u.img", compress=True),
            drive_backup(compress=True, **NEW),
            Differs(Content("new"), "ours leaves no file behind", [{"file": "none"}]),
            backup(compress=False),
            ENDED,
        ],
    ),
    Scenario(
        "backup-filter-names",
        [
            *DISKS,
            *[backup(filter_node_name=bad) for bad in ("n", "t", "", "1", "a b", "#f", "x" * 32)],
            backup(filter_node_name=3),
            drive_backup(target="DIR/u.img", filter_node_name="n"),
            backup(filter_node_name="f", job_id="1"),
            QUERY,
            backup(filter_node_name="x" * 31),
            ENDED,
        ],
    ),
    Scenario(
        "backup-filter-while-the-job-runs",
        [
            *DISKS,
            node("u"),
            node("m"),
            backup(filter_node_name="f", speed=1),
            Asleep(),
            QUERY,
            node("f", file={"driver": "file", "filename": "DIR/u.img"}),
            backup(job_id="k", target="u", filter_node_name="f"),
            delete("f"),
            Differs(
                bitmap("b", "f"),
                "ours is there to be seen only",
                refused("Cannot find device='f' nor node-name='f'"),
            ),
            CANCEL,
            QUERY,
        ],
    ),
    Scenario(
        "backup-filter-of-a-read-only-disk",
        [
            node("n", read_only=True),
            node("t"),
            backup(filter_node_name="f", speed=1),
            Asleep(),
            do("query-named-block-nodes", flat=True),
            CANCEL,
            QUERY,
        ],
    ),
    Scenario(
        "backup-nodes-that-are-exported",
        [
            *NAMED_FILES,
            server(),
            export("before", "t", name="before", writable=True),
            backup(speed=1),
            Asleep(),
            export("t", "t"),
            export("w", "t", name="w", writable=True),
            export("tf", "tf"),
            export("tw", "tf", name="tw", writable=True),
            export("n", "n"),
            export("nf", "nf"),
            export("nw", "nf", name="nw", writable=True),
            *[unexport(each) for each in ("before", "t", "w", "tf", "tw", "n", "nf", "nw")],
            CANCEL,
        ],
    ),
    Scenario(
        "backup-disk-that-is-written-below",
        [
            *NAMED_FILES,
            node("n2", file="nf"),
            server(),
            export("w", "nf", name="w", writable=True),
            conflict("an unnamed block device", "root"),
            export("r", "n", name="r"),
            backup(),
            unexport("w"),
            unexport("r"),
            export("w2", "n2", name="w2", writable=True),
            conflict("node 'n2'", "file"),
            unexport("w2"),
            export("w", "tf", name="w", writable=True),
            backup(),
            ENDED,
        ],
    ),
    Scenario(
        "backup-discards-its-source",
        [
            node("n", discard="unmap"),
            node("t"),
            backup(discard_source=True),
            ENDED,
            Content("n.img"),
            Content("t.img"),
        ],
    ),
    Scenario(
        "backup-discards-only-where-the-source-does",
        [*DISKS, backup(discard_source=True), ENDED, Content("n.img"), Content("t.img")],
    ),
    Scenario(
        "backup-discards-what-a-bitmap-names",
        [
            node("n", discard="unmap"),
            node("t"),
            *[bitmap("b"), bitmap("c")],
            server(),
            export("e", writable=True),
            *TWO_WRITES,
            backup(discard_source=True, sync="incremental", bitmap="b"),
            ENDED,
            Bitmaps("n"),
            Content("n.img"),
            Content("t.img"),
        ],
    ),
    Scenario(
        "backup-discards-not-what-a-guest-wrote",
        [
            node("n", discard="unmap"),
            node("t"),
            server(),
            export("e", writable=True),
            *slow_backup(discard_source=True),
            Write("n", 2 * MIB, CLUSTER),
            do("block-job-set-speed", device="j", speed=0),
            ENDED,
            Content("n.img"),
            Content("t.img"),
        ],
    ),
    Scenario(
        "backup-discards-no-read-only-disk",
        [
            node("n", read_only=True),
            node("t"),
            backup(discard_source=3),
            backup(discard_source=True, job_id="1"),
            Differs(
                backup(discard_source=True, speed=-1),
                "ours makes no job of it",
                refused("Block node is read-only"),
            ),
            server(),
            export("e"),
            backup(discard_source=True),
            Content("n.img"),
        ],
    ),
]
