"""Jobs: what may be done to them when, and every event in its order."""

from __future__ import annotations

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Both,
    Content,
    FileSizeLimit,
    Scenario,
    Step,
    Terminate,
    Until,
    Write,
    do,
)
from tests.interop.words import (
    DISKS,
    ENDED,
    GUEST_DISKS,
    backup,
    bitmap,
    export,
    node,
    server,
    slow_backup,
    status,
)

QUERIES: list[Step] = [do("query-jobs"), do("query-block-jobs")]
LEGACY = ("cancel", "pause", "resume", "complete")
PAUSE = do("job-pause", id="j")
RESUME = do("job-resume", id="j")
CANCEL = do("job-cancel", id="j")
LEGACY_CANCEL = do("block-job-cancel", device="j")
SET_SPEED = "block-job-set-speed"
CHANGE = "block-job-change"
JOB_TYPES = (
    *("amend", "backup", "commit", "create", "mirror", "stream"),
    *("snapshot-delete", "snapshot-load", "snapshot-save"),
)
PENDING = Until("BLOCK_JOB_PENDING")
ERROR = Until("BLOCK_JOB_ERROR")


def legacy(job: str, *verbs: str) -> list[Step]:
    """block-job-VERB; the older ones call the job ``device``."""
    return [
        do(f"block-job-{verb}", **{"device" if verb in LEGACY else "id": job}) for verb in verbs
    ]


def verbs(job: str, *names: str) -> list[Step]:
    return [do(f"job-{verb}", id=job) for verb in names]


def failing(**options: object) -> list[Step]:
    """A backup of one dirty cluster that its target can't take."""
    return [
        *GUEST_DISKS,
        bitmap("b"),
        Write("n", 2 * MIB, 512),
        FileSizeLimit(MIB),
        backup(sync="incremental", bitmap="b", **options),
    ]


SCENARIOS = [
    Scenario("job-life", [*DISKS, *QUERIES, backup(), ENDED, *QUERIES]),
    Scenario(
        "job-finalized-by-hand",
        [
            *DISKS,
            backup(auto_finalize=False),
            PENDING,
            *QUERIES,
            *legacy("j", "pause", "resume", "complete", "dismiss"),
            *verbs("j", "pause", "resume", "complete", "dismiss"),
            do(SET_SPEED, device="j", speed=1),
            do("block-job-finalize", id="j"),
            *QUERIES,
        ],
    ),
    Scenario(
        "job-cancelled-when-pending",
        [*DISKS, backup(auto_finalize=False), PENDING, LEGACY_CANCEL, *QUERIES],
    ),
    Scenario(
        "job-dismissed-by-hand",
        [
            *DISKS,
            backup(auto_dismiss=False),
            status("concluded"),
            *QUERIES,
            *legacy("j", *LEGACY, "finalize"),
            *verbs("j", *LEGACY, "finalize"),
            do(SET_SPEED, device="j", speed=1),
            backup(),
            do("job-dismiss", id="j"),
            *QUERIES,
        ],
    ),
    Scenario(
        "job-nothing-by-itself",
        [
            *DISKS,
            backup(auto_finalize=False, auto_dismiss=False),
            PENDING,
            do("job-finalize", id="j"),
            do("block-job-dismiss", id="j"),
        ],
    ),
    Scenario(
        "job-running-refuses",
        [
            *DISKS,
            *slow_backup(),
            *legacy("j", "resume", "complete", "finalize", "dismiss"),
            *verbs("j", "resume", "complete", "finalize", "dismiss"),
            backup(),
        ],
    ),
    Scenario(
        "job-unknown",
        [
            *legacy("nope", *LEGACY, "finalize", "dismiss"),
            *verbs("nope", *LEGACY, "finalize", "dismiss"),
            do(SET_SPEED, device="nope", speed=1),
        ],
    ),
    Scenario(
        "job-arguments",
        [
            *[do(f"block-job-{verb}") for verb in (*LEGACY, "finalize", "dismiss", "set-speed")],
            *[do(f"job-{verb}") for verb in (*LEGACY, "finalize", "dismiss")],
            do("job-cancel", device="j"),
            do("block-job-cancel", device="j", force="x"),
            do("block-job-cancel", device=3),
            do(SET_SPEED, device="j"),
            do("query-jobs", x=1),
            do("query-block-jobs", x=1),
        ],
    ),
    Scenario(
        "job-paused-and-resumed",
        [
            *DISKS,
            *slow_backup(),
            PAUSE,
            status("paused"),
            *QUERIES,
            PAUSE,
            do("block-job-pause", device="j"),
            do(SET_SPEED, device="j", speed=0),
            *QUERIES,
            do("block-job-resume", device="j"),
            ENDED,
            Content("t.img"),
        ],
    ),
    Scenario(
        "job-speed",
        [
            *DISKS,
            *slow_backup(),
            *[do(SET_SPEED, device="j", speed=bad) for bad in (-1, "1", 1.5, None, 1 << 63)],
            do(SET_SPEED, device="j", speed=1000),
            *QUERIES,
            do(SET_SPEED, device="j", speed=0),
            ENDED,
        ],
    ),
    Scenario(
        "job-can-not-be-changed",
        [
            *DISKS,
            do(CHANGE),
            do(CHANGE, id="j"),
            do(CHANGE, type="mirror"),
            do(CHANGE, id=1, type="backup"),
            do(CHANGE, id="j", type=1),
            do(CHANGE, id="j", type="wat"),
            do(CHANGE, id="j", type="mirror"),
            do(CHANGE, id="j", type="mirror", copy_mode="wat"),
            do(CHANGE, id="j", type="mirror", copy_mode="background"),
            *slow_backup(auto_finalize=False, auto_dismiss=False),
            do(CHANGE, id="j", type="mirror", copy_mode="background", x=1),
            do(CHANGE, id="j", type="backup", copy_mode="background"),
            *[do(CHANGE, id="j", type=kind) for kind in JOB_TYPES],
            PAUSE,
            status("paused"),
            do(CHANGE, id="j", type="backup"),
            RESUME,
            do(SET_SPEED, device="j", speed=0),
            PENDING,
            do(CHANGE, id="j", type="backup"),
            do("job-finalize", id="j"),
            do(CHANGE, id="j", type="backup"),
        ],
    ),
    Scenario("job-cancelled", [*DISKS, *slow_backup(), CANCEL, *QUERIES]),
    Scenario(
        "job-cancelled-by-force",
        [*DISKS, *slow_backup(), do("block-job-cancel", device="j", force=True)],
    ),
    Scenario(
        "job-cancelled-and-kept",
        [
            *DISKS,
            *slow_backup(auto_dismiss=False, auto_finalize=False),
            LEGACY_CANCEL,
            *QUERIES,
            do("block-job-dismiss", id="j"),
        ],
    ),
    Scenario(
        "job-cancelled-when-paused",
        [
            *DISKS,
            *slow_backup(),
            PAUSE,
            status("paused"),
            LEGACY_CANCEL,
            do("block-job-cancel", device="j", force=True),
        ],
    ),
    Scenario(
        "job-two-are-listed-newest-first",
        [
            *DISKS,
            node("m"),
            node("u"),
            *slow_backup(),
            *slow_backup("k", device="m", target="u"),
            *QUERIES,
            do("job-cancel", id="j"),
            *QUERIES,
        ],
    ),
    Scenario("job-error-is-reported", [*failing(), ENDED, *QUERIES, Bitmaps("n")]),
    Scenario(
        "job-error-that-is-not-enospc",
        [*failing(on_target_error="enospc"), ENDED],
    ),
    Scenario(
        "job-failed-is-not-pending",
        [
            *failing(auto_finalize=False, auto_dismiss=False),
            status("concluded"),
            *QUERIES,
            backup(),
            do("job-dismiss", id="j"),
        ],
    ),
    Scenario(
        "job-error-stops-it-until-resumed",
        [
            *failing(on_target_error="stop"),
            ERROR,
            status("paused"),
            *QUERIES,
            Bitmaps("n"),
            PAUSE,
            RESUME,
            ERROR,
            status("paused"),
            LEGACY_CANCEL,
            FileSizeLimit(),
            RESUME,
            ENDED,
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "job-stopped-by-an-error-is-cancelled",
        [
            *failing(on_target_error="stop"),
            ERROR,
            status("paused"),
            Both(CANCEL, ENDED),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "quit-cancels-a-running-job",
        [
            *DISKS,
            node("m"),
            server(),
            export("e", "m", writable=True),
            Write("m", 0, 512),
            *slow_backup(),
        ],
    ),
    Scenario("quit-cancels-a-pending-job", [*DISKS, backup(auto_finalize=False), PENDING]),
    Scenario(
        "quit-dismisses-a-concluded-job",
        [*DISKS, backup(auto_dismiss=False), status("concluded")],
    ),
    Scenario(
        "quit-cancels-a-paused-job",
        [*DISKS, *slow_backup(), PAUSE, status("paused")],
    ),
    Scenario(
        "sigterm-ends-it-as-quit-does",
        [
            *DISKS,
            node("m"),
            server(),
            export("e", "m", writable=True),
            Write("m", 0, 512),
            *slow_backup(),
        ],
        Terminate(),
    ),
]
