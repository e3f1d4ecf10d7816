"""drive-backup and blockdev-backup: what is refused, what is copied, what becomes of the bitmap."""

from __future__ import annotations

from itertools import product
from typing import Any

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Content,
    Differs,
    FileSizeLimit,
    Read,
    Scenario,
    Until,
    Write,
    do,
)
from tests.interop.words import (
    DISKS,
    ENDED,
    GUEST_DISKS,
    TWO_WRITES,
    backup,
    bitmap,
    delete,
    drive_backup,
    each_bitmap_command,
    export,
    node,
    refused,
    server,
    slow_backup,
    status,
    unexport,
)

CANCEL = do("block-job-cancel", device="j")
NEW: dict[str, Any] = {"mode": "absolute-paths", "target": "DIR/new"}
SYNCS = ("incremental", "bitmap", "full", "top", "none")
BITMAP_OPTIONS: list[dict[str, str]] = [
    {},
    {"bitmap": "nope"},
    {"bitmap": ""},
    {"bitmap": "b"},
    {"bitmap_mode": "on-success"},
    {"bitmap_mode": "never"},
    {"bitmap": "b", "bitmap_mode": "on-success"},
    {"bitmap": "b", "bitmap_mode": "always"},
    {"bitmap": "b", "bitmap_mode": "never"},
    {"bitmap": "nope", "bitmap_mode": "never"},
]


def succeeds(sync: str, mode: str) -> Scenario:
    """A backup during which the guest writes; then the bitmap tells what came after its start."""
    return Scenario(
        f"backup-{sync}-{mode}",
        [
            *GUEST_DISKS,
            bitmap("a"),
            bitmap("b"),
            bitmap("c"),
            *TWO_WRITES,
            *slow_backup(sync=sync, bitmap="b", bitmap_mode=mode, auto_finalize=False),
            Bitmaps("n"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            do("block-job-set-speed", device="j", speed=0),
            Until("BLOCK_JOB_PENDING"),
            Bitmaps("n"),
            do("job-finalize", id="j"),
            Bitmaps("n"),
            Content("t.img"),
        ],
    )


def fails(sync: str, mode: str) -> Scenario:
    """A backup whose target fails at its first cluster: all that it should copy is still dirty."""
    return Scenario(
        f"backup-{sync}-{mode}-fails",
        [
            *GUEST_DISKS,
            bitmap("a"),
            bitmap("b"),
            bitmap("c"),
            Write("n", 2 * MIB, 512),
            FileSizeLimit(MIB),
            backup(sync=sync, bitmap="b", bitmap_mode=mode),
            ENDED,
            FileSizeLimit(),
            Bitmaps("n"),
        ],
    )


SCENARIOS = [
    Scenario(
        "backup-full",
        [*DISKS, backup(), ENDED, Content("t.img"), Content("n.img")],
    ),
    Scenario(
        "backup-of-a-read-only-disk",
        [node("n", read_only=True), node("t"), backup(), ENDED, Content("t.img")],
    ),
    Scenario(
        "backup-of-an-odd-disk",
        [node("odd"), drive_backup(device="odd", **NEW), ENDED, Content("new")],
    ),
    Scenario(
        "backup-incremental-of-nothing",
        [*DISKS, bitmap("b"), backup(sync="incremental", bitmap="b"), ENDED, Bitmaps("n")],
    ),
    Scenario(
        "backup-chain",
        [
            *GUEST_DISKS,
            bitmap("b"),
            backup(bitmap="b", bitmap_mode="on-success"),
            ENDED,
            *TWO_WRITES,
            Bitmaps("n"),
            backup(sync="incremental", bitmap="b"),
            ENDED,
            Bitmaps("n"),
            Content("n.img"),
            Content("t.img"),
        ],
    ),
    Scenario(
        "backup-incremental-to-a-new-file",
        [
            *GUEST_DISKS,
            bitmap("b"),
            *TWO_WRITES,
            drive_backup(sync="incremental", bitmap="b", **NEW),
            ENDED,
            Content("new"),
        ],
    ),
    Scenario(
        "backup-of-a-disabled-bitmap",
        [
            *GUEST_DISKS,
            bitmap("b"),
            *TWO_WRITES,
            *each_bitmap_command("n", "b", "disable"),
            backup(sync="incremental", bitmap="b", auto_finalize=False),
            Until("BLOCK_JOB_PENDING"),
            Bitmaps("n"),
            do("job-finalize", id="j"),
            Bitmaps("n"),
        ],
    ),
    *[succeeds("bitmap", mode) for mode in ("on-success", "always", "never")],
    *[succeeds("full", mode) for mode in ("on-success", "always")],
    succeeds("incremental", "on-success"),
    *[fails("bitmap", mode) for mode in ("on-success", "always", "never")],
    fails("incremental", "on-success"),
    Scenario(
        "backup-cancelled",
        [
            *GUEST_DISKS,
            bitmap("b"),
            *TWO_WRITES,
            *slow_backup(sync="incremental", bitmap="b"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            CANCEL,
            do("query-block-jobs"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "backup-holds-its-bitmap",
        [
            *GUEST_DISKS,
            node("u"),
            bitmap("b"),
            bitmap("c"),
            *TWO_WRITES,
            *slow_backup(sync="incremental", bitmap="b"),
            *each_bitmap_command("n", "b", "add", "remove", "clear", "enable", "disable"),
            do("block-dirty-bitmap-merge", node="n", target="b", bitmaps=["c"]),
            do("block-dirty-bitmap-merge", node="n", target="c", bitmaps=["b"]),
            backup(job_id="k", target="u", sync="incremental", bitmap="b"),
            backup(job_id="k", target="u", sync="bitmap", bitmap="b", bitmap_mode="never"),
            *each_bitmap_command("n", "c", "disable", "clear", "remove"),
            CANCEL,
        ],
    ),
    Scenario(
        "backup-two-of-one-disk",
        [
            *GUEST_DISKS,
            node("u"),
            bitmap("b"),
            *TWO_WRITES,
            *slow_backup(sync="incremental", bitmap="b"),
            backup(job_id="k", target="u"),
            status("null", "k"),
            Content("u.img"),
            do("query-jobs"),
            CANCEL,
        ],
    ),
    Scenario(
        "backup-refuses-bitmap-options",
        [
            node("n"),
            node("small"),
            bitmap("b"),
            *[
                backup(target="small", sync=sync, **options)
                for sync, options in product(SYNCS, BITMAP_OPTIONS)
            ],
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "backup-refusals-in-order",
        [
            *DISKS,
            node("small"),
            node("m", read_only=True),
            backup(device="nope", target="nope", sync="incremental"),
            backup(target="nope", sync="incremental"),
            backup(target="n", sync="incremental"),
            backup(target="n", job_id="1"),
            backup(target="small", job_id="1"),
            backup(target="m", job_id="1"),
            backup(device=""),
            *[backup(job_id=bad) for bad in ("", "1", "a b", "a/b", "é", "#j")],
            backup(job_id="1", speed=-1),
            backup(speed=-1),
            backup(auto_dismiss=False),
            status("concluded"),
            backup(),
            backup(target="small"),
        ],
    ),
    Scenario(
        "backup-arguments",
        [
            *DISKS,
            do("blockdev-backup"),
            do("blockdev-backup", device="n"),
            do("blockdev-backup", device="n", target="t"),
            do("blockdev-backup", device="n", sync="full"),
            do("drive-backup", device="n", sync="full"),
            backup(sync="wat"),
            backup(bitmap="b", bitmap_mode="wat"),
            *[backup(speed=bad) for bad in ("1", 1.5, None, 1 << 63, 1 << 64)],
            backup(on_target_error="wat"),
            backup(auto_finalize="x"),
            backup(mode="existing"),
            drive_backup(mode="wat"),
            drive_backup(format=3),
            drive_backup(target=3),
        ],
    ),
    Scenario("backup-top-of-raw-is-full", [*DISKS, backup(sync="top"), ENDED, Content("t.img")]),
    Scenario(
        "backup-top-copies-holes",
        [node("t"), node("m"), backup(device="t", target="m", sync="top"), ENDED, Content("m.img")],
    ),
    Scenario(
        "backup-none-runs-until-cancelled",
        [
            *GUEST_DISKS,
            backup(sync="none"),
            do("query-block-jobs"),
            Write("n", 100, 10),
            Write("n", MIB, 200000),
            do("query-jobs"),
            do("block-job-complete", device="j"),
            do("job-finalize", id="j"),
            do("block-job-set-speed", device="j", speed=1000),
            do("job-pause", id="j"),
            status("paused"),
            Write("n", 3 * MIB - 1, 1),
            do("query-block-jobs"),
            CANCEL,
            do("job-resume", id="j"),
            CANCEL,
            Content("t.img"),
        ],
    ),
    Scenario(
        "backup-none-when-all-is-overwritten",
        [
            *GUEST_DISKS,
            backup(sync="none", auto_dismiss=False),
            Write("n", 0, 3 * MIB),
            CANCEL,
            do("query-block-jobs"),
            Content("t.img"),
            Content("n.img"),
        ],
    ),
    Scenario("backup-none-ended-by-quit", [*DISKS, backup(sync="none")]),
    Scenario(
        "backup-none-to-a-node-that-is-read",
        [
            *DISKS,
            server(),
            export("t", "t"),
            backup(sync="none"),
            export("u", "t", name="u"),
            do("query-block-exports"),
            unexport("t"),
            delete("t"),
        ],
    ),
    Scenario(
        "backup-none-read-by-somebody-else",
        [
            *GUEST_DISKS,
            export("t", "t"),
            Read("t", 0, 3 * MIB),
            backup(sync="none"),
            Write("n", 100, 10),
            Write("n", MIB, 200000),
            do("block-job-pause", device="j"),
            status("paused"),
            Write("n", 2 * MIB, 10),
            do("block-job-cancel", device="j", force=True),
            Read("t", 0, 3 * MIB),
            Read("n", 0, 3 * MIB),
        ],
    ),
    Scenario(
        "drive-backup-none-wants-a-backing-file",
        [
            node("n"),
            bitmap("b"),
            drive_backup(sync="none"),
            drive_backup(sync="none", format="file"),
            drive_backup(sync="none", bitmap="nope", job_id="1"),
            drive_backup(sync="none", target="DIR/none"),
            drive_backup(sync="none", **NEW),
            drive_backup(sync="none", **{**NEW, "format": "file"}),
            drive_backup(sync="none", **{**NEW, "format": "wat"}),
            do("drive-backup", device="n", sync="none", target="DIR/new"),
            Content("new"),
        ],
    ),
    Scenario(
        "drive-backup-top-is-full",
        [
            node("n"),
            bitmap("b"),
            drive_backup(sync="top", bitmap="b", bitmap_mode="never"),
            drive_backup(sync="top"),
            ENDED,
            Content("t.img"),
        ],
    ),
    Scenario(
        "drive-backup-to-an-existing-file",
        [node("n"), drive_backup(), ENDED, Content("t.img")],
    ),
    Scenario("drive-backup-to-a-new-file", [node("n"), drive_backup(**NEW), ENDED, Content("new")]),
    Scenario(
        "drive-backup-replaces-a-file",
        [
            node("small"),
            drive_backup(device="small", target="DIR/m.img", mode="absolute-paths"),
            ENDED,
            Content("m.img"),
        ],
    ),
    Scenario(
        "drive-backup-by-default-makes-a-raw-file",
        [
            node("n"),
            do("drive-backup", job_id="j", device="n", sync="full", target="DIR/new"),
            ENDED,
            Content("new"),
        ],
    ),
    Scenario(
        "drive-backup-targets-that-can-not-be",
        [
            node("n"),
            drive_backup(target="DIR/none"),
            drive_backup(target="DIR"),
            drive_backup(target=""),
            drive_backup(target="DIR/small.img"),
            drive_backup(target="DIR/none/x", mode="absolute-paths"),
            drive_backup(target="DIR", mode="absolute-paths"),
            drive_backup(target="", mode="absolute-paths"),
            drive_backup(format="wat"),
            drive_backup(format=""),
            drive_backup(format="wat", **NEW),
            drive_backup(device="nope"),
            drive_backup(device="nope", sync="incremental", target="DIR/none"),
            drive_backup(sync="incremental", target="DIR/none"),
            Content("t.img"),
        ],
    ),
    Scenario(
        "drive-backup-to-its-own-source",
        [
            node("n"),
            Differs(
                drive_backup(target="DIR/n.img"),
                "ours makes no job of it",
                refused(
                    "Failed to get \"write\" lock: is another process or node using 'DIR/n.img'?"
                ),
            ),
            Content("n.img"),
        ],
    ),
]
