"""Several commands at one instant: all or none, and jobs that end together."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    DISK_BYTES,
    MIB,
    Asleep,
    Bitmaps,
    Content,
    Differs,
    Do,
    EachJob,
    FileSizeLimit,
    Scenario,
    Step,
    Until,
    Write,
    do,
)
from tests.interop.words import (
    CLUSTER,
    DISKS,
    GUEST_DISKS,
    TWO_WRITES,
    bitmap,
    node,
    not_kept,
    status,
)

#: Two disks ``n`` and ``m``, each with a bitmap, and a target for each.
TWO_DISKS = [*DISKS, node("m"), node("u"), bitmap("b"), bitmap("b", on="m")]
GUEST_WITH_BITMAPS = [*GUEST_DISKS, bitmap("b"), bitmap("c"), *TWO_WRITES]
QUERY = [do("query-jobs"), do("query-block-jobs")]


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def on_bitmap(command: str, name: str = "b", on: str = "n", **data: Any) -> dict[str, Any]:
    return action(f"block-dirty-bitmap-{command}", node=on, name=name, **data)


def merge(*sources: Any, target: str = "b", on: str = "n") -> dict[str, Any]:
    return action("block-dirty-bitmap-merge", node=on, target=target, bitmaps=[*sources])


def backup(job: str = "j", device: str = "n", target: str = "t", **data: Any) -> dict[str, Any]:
    defaults = {"job_id": job, "device": device, "target": target, "sync": "full"}
    return action("blockdev-backup", **{**defaults, **data})


def other_backup(job: str = "k", **data: Any) -> dict[str, Any]:
    return backup(job, **{"device": "m", "target": "u", **data})


def drive_backup(job: str = "j", target: str = "DIR/new", **data: Any) -> dict[str, Any]:
    defaults = {"job_id": job, "device": "n", "target": target, "sync": "full", "format": "raw"}
    return action("drive-backup", **{**defaults, **data})


def transaction(*actions: dict[str, Any], **properties: Any) -> Do:
    named = {name.replace("_", "-"): value for name, value in properties.items()}
    return Do("transaction", {"actions": [*actions], **({"properties": named} if named else {})})


def grouped(*actions: dict[str, Any]) -> Do:
    return transaction(*actions, completion_mode="grouped")


ABORT = action("abort")
#: As a query shows a bitmap that was just added.
NEW_BITMAP = {
    "name": "b",
    "recording": True,
    "persistent": False,
    "busy": False,
    "granularity": CLUSTER,
    "count": 0,
}
SLOW: dict[str, Any] = {"speed": 1}
MANUAL: dict[str, Any] = {"auto_finalize": False}


def refusals(name: str, *transactions: Step) -> Scenario:
    """Each is refused; the bitmaps and nodes are those from before."""
    steps = [step for each in transactions for step in (each, Bitmaps("n"), Bitmaps("m"))]
    return Scenario(f"transaction-refused-{name}", [*TWO_DISKS, bitmap("c"), *steps])


def undone(name: str, *actions: dict[str, Any]) -> Scenario:
    """Aborted at its end; bitmaps are what they were, also for writes that come then."""
    return Scenario(
        f"transaction-undone-{name}",
        [
            *GUEST_WITH_BITMAPS,
            transaction(on_bitmap("clear", "c")),
            Bitmaps("n"),
            transaction(*actions, ABORT),
            Bitmaps("n"),
            Write("n", MIB, 512),
            Bitmaps("n"),
        ],
    )


def done(name: str, *actions: dict[str, Any]) -> Scenario:
    """Takes effect; then a guest writes."""
    return Scenario(
        f"transaction-{name}",
        [
            *GUEST_WITH_BITMAPS,
            transaction(*actions),
            Bitmaps("n"),
            Write("n", MIB, 512),
            Bitmaps("n"),
        ],
    )


def group(name: str, first: dict[str, Any], second: dict[str, Any], *then: Any) -> Scenario:
    """Jobs ``j`` and ``k``, which end together."""
    start = grouped(backup(**first), other_backup(**second))
    return Scenario(f"group-{name}", [*TWO_DISKS, start, *then, *QUERY])


CHANGES: dict[str, list[dict[str, Any]]] = {
    "add": [on_bitmap("add", "x")],
    "add-and-remove": [on_bitmap("add", "x"), on_bitmap("remove", "x")],
    "remove": [on_bitmap("remove")],
    "clear": [on_bitmap("clear")],
    "disable": [on_bitmap("disable")],
    "disable-twice": [on_bitmap("disable"), on_bitmap("disable")],
    "disable-and-enable": [on_bitmap("disable"), on_bitmap("enable")],
    "enable-what-is-enabled": [on_bitmap("enable")],
    "merge": [merge("b", target="c")],
    "merge-of-itself": [merge("b", "c", {"node": "n", "name": "b"})],
    "clear-and-merge": [on_bitmap("clear"), merge("c")],
    "merge-and-clear": [merge("b", target="c"), on_bitmap("clear", "c")],
    "split": [on_bitmap("add", "x"), merge("b", target="x"), on_bitmap("clear")],
    "rotate": [
        on_bitmap("add", "x", granularity=4096),
        on_bitmap("disable"),
        merge("b", "c", target="x"),
        on_bitmap("remove"),
        on_bitmap("remove", "c"),
    ],
}

#: What the one job of a group does when the other fails.
SIBLINGS: dict[str, dict[str, Any]] = {
    "another-waits": {"sync": "incremental", "bitmap": "b"},
    "another-runs": {**SLOW, "bitmap": "b", "bitmap_mode": "on-success"},
}

SCENARIOS = [
    *[done(name, *actions) for name, actions in CHANGES.items()],
    *[undone(name, *actions) for name, actions in CHANGES.items()],
    Scenario(
        "transaction-of-nothing",
        [
            transaction(),
            transaction(completion_mode="individual"),
            grouped(),
            Do("transaction", {"actions": [], "properties": {}}),
        ],
    ),
    refusals(
        "bitmaps",
        transaction(on_bitmap("add", "x"), on_bitmap("add", "x")),
        transaction(on_bitmap("add", "x"), on_bitmap("add", on="zz")),
        transaction(on_bitmap("add", "x", granularity=3)),
        transaction(on_bitmap("add", "")),
        not_kept(transaction(on_bitmap("add", "x", persistent=True))),
        transaction(on_bitmap("remove", "zz")),
        transaction(on_bitmap("clear", "zz")),
        transaction(on_bitmap("clear", on="zz")),
        transaction(on_bitmap("disable", "zz")),
        transaction(merge("zz")),
        transaction(merge(target="zz")),
        transaction(merge("b", on="zz")),
        transaction(on_bitmap("clear", on="m"), merge("c", {"node": "zz", "name": "b"})),
    ),
    refusals(
        "after-remove",
        transaction(on_bitmap("remove"), on_bitmap("remove")),
        transaction(on_bitmap("remove"), on_bitmap("clear")),
        transaction(on_bitmap("remove"), on_bitmap("disable")),
        transaction(on_bitmap("remove"), on_bitmap("add")),
        transaction(on_bitmap("remove"), merge("c")),
        transaction(on_bitmap("remove"), merge("b", target="c")),
        transaction(on_bitmap("remove"), backup(sync="incremental", bitmap="b")),
    ),
    refusals(
        "abort",
        transaction(ABORT),
        transaction(ABORT, on_bitmap("add", on="zz")),
        transaction(on_bitmap("add", on="zz"), ABORT),
        grouped(ABORT),
        grouped(ABORT, on_bitmap("add", on="zz")),
        grouped(backup(), ABORT),
    ),
    refusals(
        "jobs",
        transaction(backup(), ABORT),
        transaction(backup(), other_backup(), ABORT),
        transaction(backup(), other_backup("j")),
        transaction(backup(), other_backup(speed=-1)),
        transaction(backup(job=""), other_backup()),
        transaction(backup(), backup("k", device="t", target="u")),
        transaction(backup(), backup("k", device="m")),
        transaction(backup(), backup("k", device="m", target="zz")),
        transaction(backup(sync="incremental", bitmap="b"), on_bitmap("clear")),
        transaction(backup(sync="incremental", bitmap="b"), on_bitmap("remove")),
        transaction(
            backup(sync="incremental", bitmap="b"),
            backup("k", target="u", sync="incremental", bitmap="b"),
        ),
        transaction(
            backup(bitmap="b", bitmap_mode="on-success"),
            backup("k", target="u", sync="incremental"),
        ),
        grouped(backup(), other_backup(speed=-1)),
    ),
    Scenario(
        "transaction-refused-enable-of-a-bitmap-in-use",
        [
            *TWO_DISKS,
            transaction(on_bitmap("remove"), on_bitmap("enable")),
            Differs(
                Bitmaps("n"),
                "the peer 'undoes' the action that was refused, and disables the bitmap",
                [{"bitmaps": [NEW_BITMAP]}],
            ),
        ],
        queries=(),
    ),
    Scenario(
        "transaction-undoes-the-freeze",
        [
            *GUEST_WITH_BITMAPS,
            transaction(
                on_bitmap("clear", "c"),
                merge("b", target="c"),
                backup(bitmap="c", bitmap_mode="on-success"),
                ABORT,
            ),
            Bitmaps("n"),
            Write("n", MIB, 512),
            Bitmaps("n"),
        ],
    ),
    *[
        Scenario(
            f"transaction-undoes-the-freeze-of-{sync}-always",
            [
                *TWO_DISKS,
                transaction(backup(sync=sync, bitmap="b", bitmap_mode="always"), ABORT),
                Differs(
                    Bitmaps("n"),
                    "the peer leaves the bitmap all dirty, or dies",
                    [{"bitmaps": [NEW_BITMAP]}],
                ),
            ],
            queries=(),
        )
        for sync in ("full", "bitmap")
    ],
    Scenario(
        "transaction-of-a-bitmap-and-a-backup",
        [
            *GUEST_WITH_BITMAPS,
            transaction(
                on_bitmap("add", "x"),
                merge("b", target="x"),
                on_bitmap("clear"),
                backup(sync="bitmap", bitmap="x", bitmap_mode="on-success", **SLOW),
            ),
            Asleep(),
            Write("n", MIB, 512),
            Bitmaps("n"),
            do("job-cancel", id="j"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "transaction-two-backups",
        [
            *TWO_DISKS,
            transaction(backup(auto_dismiss=False), other_backup(auto_dismiss=False, **SLOW)),
            status("concluded"),
            Asleep("k"),
            *QUERY,
            do("job-cancel", id="k"),
            *QUERY,
            Content("t.img"),
        ],
    ),
    Scenario(
        "transaction-two-backups-of-one-disk",
        [
            *TWO_DISKS,
            transaction(
                backup(sync="incremental", bitmap="b", **MANUAL), backup("k", target="u", **SLOW)
            ),
            Until("BLOCK_JOB_PENDING"),
            Asleep("k"),
            *QUERY,
        ],
        ending=EachJob(do("quit")),
    ),
    Scenario(
        "transaction-drive-backups",
        [
            *GUEST_WITH_BITMAPS,
            node("m"),
            transaction(
                on_bitmap("clear"),
                drive_backup(**MANUAL),
                drive_backup("k", target="DIR/other", device="m", mode="absolute-paths", **SLOW),
            ),
            status("pending"),
            Asleep("k"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            do("job-finalize", id="j"),
            do("job-cancel", id="k"),
            Content("new"),
        ],
    ),
    # Jobs that end together.
    Scenario(
        "group-of-a-single-job",
        [*TWO_DISKS, grouped(backup()), status("null"), Content("t.img")],
    ),
    group("succeeds", {}, {}, EachJob(status("null", "j")), Content("t.img"), Content("u.img")),
    *[
        group(
            f"{manual}-waits-and-{finalized}-is-finalized",
            MANUAL if "j" in manual else {},
            MANUAL if "k" in manual else {},
            EachJob(status("pending", "j")),
            *([Until("BLOCK_JOB_PENDING", {"id": "j"})] if "j" in manual else []),
            *QUERY,
            do("job-finalize", id=finalized),
            do("job-finalize", id=finalized),
        )
        for manual in ("j", "k", "jk")
        for finalized in "jk"
    ],
    *[
        group(
            f"{cancelled}-is-cancelled-while-j-waits",
            {},
            SLOW,
            status("waiting"),
            Asleep("k"),
            *QUERY,
            *[
                do(f"job-{verb}", id="j")
                for verb in ("pause", "resume", "complete", "finalize", "dismiss")
            ],
            do("block-job-set-speed", device="j", speed=1),
            do("job-cancel", id=cancelled),
        )
        for cancelled in "jk"
    ],
    *[
        group(
            f"{cancelled}-is-cancelled-while-k-waits",
            SLOW,
            {},
            status("waiting", "k"),
            Asleep(),
            EachJob(do("block-job-cancel", device=cancelled)),
        )
        for cancelled in "jk"
    ],
    *[
        group(
            f"{cancelled}-is-cancelled-while-both-are-pending",
            MANUAL,
            {},
            EachJob(status("pending")),
            Until("BLOCK_JOB_PENDING"),
            do("job-cancel", id=cancelled),
        )
        for cancelled in "jk"
    ],
    group(
        "is-cancelled-while-both-run",
        SLOW,
        SLOW,
        Asleep(),
        Asleep("k"),
        EachJob(do("job-cancel", id="k")),
    ),
    group(
        "is-cancelled-while-one-is-paused",
        SLOW,
        SLOW,
        Asleep(),
        Asleep("k"),
        do("job-pause", id="k"),
        status("paused", "k"),
        do("block-job-cancel", device="k"),
        EachJob(do("job-cancel", id="j")),
    ),
    group(
        "is-cancelled-and-kept",
        {**SLOW, "auto_dismiss": False},
        {"auto_dismiss": False},
        status("waiting", "k"),
        Asleep(),
        EachJob(do("job-cancel", id="j")),
        *QUERY,
        do("job-dismiss", id="j"),
        do("job-dismiss", id="k"),
    ),
    *[
        Scenario(
            f"group-fails-while-{other}",
            [
                *TWO_DISKS,
                FileSizeLimit(DISK_BYTES - CLUSTER),
                grouped(
                    other_backup("k", **options),
                    backup(bitmap="b", bitmap_mode="on-success", auto_dismiss=False),
                ),
                EachJob(status("null", "k")),
                FileSizeLimit(),
                *QUERY,
                Bitmaps("n"),
                Bitmaps("m"),
            ],
        )
        for other, options in SIBLINGS.items()
    ],
    Scenario(
        "group-by-bitmaps",
        [
            *GUEST_WITH_BITMAPS,
            node("m"),
            node("u"),
            grouped(
                backup(sync="incremental", bitmap="b", auto_finalize=False),
                other_backup(sync="full", **SLOW),
            ),
            status("waiting"),
            Asleep("k"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            do("job-cancel", id="k"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "group-by-bitmaps-succeeds",
        [
            *GUEST_WITH_BITMAPS,
            node("m"),
            node("u"),
            grouped(backup(sync="incremental", bitmap="b", **MANUAL), other_backup()),
            EachJob(status("pending")),
            Until("BLOCK_JOB_PENDING"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            do("job-finalize", id="k"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "group-at-quit",
        [*TWO_DISKS, grouped(backup(), other_backup(**SLOW)), status("waiting"), Asleep("k")],
    ),
    Scenario(
        "group-refuses-bitmaps",
        [
            *TWO_DISKS,
            Differs(
                grouped(on_bitmap("add", "x"), on_bitmap("disable")),
                "ours takes them, so that they are of one instant with jobs that end together",
                [{"return": {}}],
            ),
        ],
        queries=(),
    ),
]
