"""Overlays put on live nodes, and who may use an image and what it stands on."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    MIB,
    Asleep,
    Bitmaps,
    Both,
    Connect,
    Content,
    Differs,
    Do,
    Reads,
    Scenario,
    Step,
    Until,
    Write,
    do,
)
from tests.interop.scenarios.create import created
from tests.interop.scenarios.transactions import ABORT, action, grouped, on_bitmap, transaction
from tests.interop.scenarios.transactions import backup as backup_action
from tests.interop.words import (
    ENDED,
    backup,
    bitmap,
    delete,
    export,
    file,
    node,
    refused,
    server,
    unexport,
)

NODES = do("query-named-block-nodes")
EXPORTS = do("query-block-exports")


def image(name: str, size: int = 3 * MIB, **options: Any) -> list[Step]:
    """A new qcow2 image NAME.q, as the node NAME."""
    return [*image_file(name, size), opened(name, **options)]


def image_file(name: str, size: int = 3 * MIB) -> list[Step]:
    return [
        *created(driver="file", filename=f"DIR/{name}.q", size=0),
        *created(driver="qcow2", file=file(f"{name}.q"), size=size),
    ]


def opened(name: str, **options: Any) -> Do:
    own = {"file": file(f"{name}.q"), **options}
    return do("blockdev-add", driver="qcow2", node_name=name, **own)


def snapshot(below: str, overlay: str) -> Do:
    return do("blockdev-snapshot", node=below, overlay=overlay)


def sync(below: str = "n", overlay: str | None = "s", **options: Any) -> Do:
    """An overlay in s.q."""
    own = {"snapshot_file": "DIR/s.q", "node_name": below, **options}
    if overlay is not None:
        own["snapshot_node_name"] = overlay
    return do("blockdev-snapshot-sync", **own)


TAKEN = "Failed to get \"write\" lock: is another process or node using 'DIR/q.q'?"


def without_guest(identifier: str) -> Step:
    """Delete an export under its guest; the reply may come before that is done, or after it."""
    gone = Until("BLOCK_EXPORT_DELETED", {"id": identifier})
    return Both(unexport(identifier, mode="hard"), gone)


def overlay_action(below: str, overlay: str) -> dict[str, Any]:
    return action("blockdev-snapshot", node=below, overlay=overlay)


def sync_action(below: str = "n", overlay: str = "s", **data: Any) -> dict[str, Any]:
    own = {"node_name": below, "snapshot_node_name": overlay, "snapshot_file": "DIR/s.q", **data}
    return action("blockdev-snapshot-sync", **own)


LIVE: list[Step] = [node("n"), server(), export("e", writable=True, name="n"), Connect("n")]

SCENARIOS = [
    Scenario(
        "snapshot-live",
        [
            *LIVE,
            *image("q"),
            Write("n", 0, 100),
            bitmap("b"),
            snapshot("n", "q"),
            NODES,
            EXPORTS,
            Reads("n"),
            Write("n", MIB - 5, 10),
            Reads("n"),
            Content("n.img"),
            Bitmaps("n"),
            *[delete(name) for name in ("q", "n")],
            without_guest("e"),
            *[delete(name) for name in ("n", "q")],
            NODES,
        ],
    ),
    Scenario(
        "snapshot-twice",
        [
            *LIVE,
            *image("q"),
            *image("r"),
            snapshot("n", "q"),
            Write("n", 0, MIB),
            snapshot("q", "r"),
            Write("n", MIB // 2, MIB),
            NODES,
            Reads("n"),
            export("q", "q", name="q"),
            Reads("q"),
            snapshot("q", "r"),
            snapshot("n", "r"),
        ],
    ),
    Scenario(
        "snapshot-below-a-node",
        [
            node("mid", file=file("m.img")),
            node("top", file="mid"),
            server(),
            export("e", "top", writable=True, name="n"),
            *image("q"),
            Write("n", 0, 100),
            snapshot("mid", "q"),
            Write("n", 4096, 100),
            NODES,
            Reads("n"),
            Content("m.img"),
            delete("q"),
            without_guest("e"),
            delete("top"),
            delete("q"),
            NODES,
        ],
    ),
    Scenario(
        "snapshot-of-what-was-made-for-another",
        [
            node("top", file={"driver": "raw", "node-name": "mid", "file": file("m.img")}),
            *image("q"),
            snapshot("mid", "q"),
            NODES,
            delete("mid"),
            delete("top"),
            NODES,
            delete("q"),
            NODES,
        ],
    ),
    Scenario(
        "snapshot-refusals",
        [
            *LIVE,
            *image("q"),
            *image("r", backing="q"),
            *image("s", read_only=True),
            node("t"),
            do("blockdev-snapshot"),
            do("blockdev-snapshot", node="n"),
            snapshot("no", "nor"),
            snapshot("n", "nor"),
            snapshot("n", "n"),
            snapshot("n", "t"),
            snapshot("n", "r"),
            snapshot("n", "s"),
            snapshot("r", "r"),
            snapshot("r", "q"),
            snapshot("q", "q"),
            snapshot("q", "nor"),
            export("f", "q", name="q"),
            snapshot("r", "q"),
            snapshot("n", "q"),
            NODES,
        ],
    ),
    Scenario(
        "snapshot-that-is-larger",
        [
            *LIVE,
            *image("q", 4 * MIB),
            snapshot("n", "q"),
            NODES,
            Reads("n"),
        ],
    ),
    Scenario(
        "snapshot-during-a-backup",
        [
            *LIVE,
            node("t"),
            *image("q"),
            bitmap("b"),
            Write("n", 0, MIB),
            backup(bitmap="b", bitmap_mode="on-success", speed=1),
            Asleep(),
            snapshot("t", "q"),
            snapshot("n", "q"),
            Write("n", 0, 2 * MIB),
            do("block-job-set-speed", device="j", speed=0),
            ENDED,
            Bitmaps("n"),
            Reads("n"),
            Content("t.img"),
            Content("n.img"),
        ],
    ),
    Scenario(
        "snapshot-with-a-job-s-target",
        [
            *LIVE,
            *image("q"),
            node("m"),
            backup(device="m", target="q", speed=1),
            Asleep(),
            Differs(
                snapshot("n", "q"),
                "the job would go on writing to the disk that guests see",
                refused("Node 'q' is busy: block device is in use by block job: backup"),
            ),
            Write("n", 0, 10),
            do("block-job-cancel", device="j"),
            without_guest("e"),
            delete("q"),
            delete("n"),
        ],
    ),
    Scenario(
        "snapshot-sync-live",
        [
            *LIVE,
            Write("n", 0, 100),
            sync(),
            NODES,
            EXPORTS,
            Write("n", MIB - 5, 10),
            Reads("n"),
            Content("n.img"),
            sync("s", "s2", snapshot_file="DIR/s2.q"),
            Write("n", 2 * MIB, 10),
            NODES,
            Reads("n"),
            delete("s2"),
            without_guest("e"),
            NODES,
            delete("n"),
        ],
    ),
    Scenario(
        "snapshot-sync-existing",
        [
            *LIVE,
            *image_file("q"),
            sync(snapshot_file="DIR/q.q", mode="existing"),
            NODES,
            Write("n", 0, 100),
            Reads("n"),
            *created(driver="file", filename="DIR/r.q", size=0),
            *created(
                driver="qcow2",
                file=file("r.q"),
                size=3 * MIB,
                backing_file="DIR/q.q",
                backing_fmt="qcow2",
            ),
            sync("s", "s2", snapshot_file="DIR/r.q", mode="existing"),
            NODES,
        ],
    ),
    Scenario(
        "snapshot-sync-without-users",
        [node("n"), sync(), NODES, delete("n"), Content("n.img")],
    ),
    Scenario(
        "snapshot-sync-opens-it-as-the-node",
        [
            node("n", cache={"no-flush": True}),
            server(),
            export("e"),
            sync(),
            NODES,
            node("m", read_only=True),
            export("r", "m"),
            sync("m", "s2", snapshot_file="DIR/s2.q"),
            NODES,
            export("w", "s2", writable=True),
        ],
    ),
    Scenario(
        "snapshot-sync-refusals",
        [
            *LIVE,
            node("t"),
            do("blockdev-snapshot-sync"),
            do("blockdev-snapshot-sync", snapshot_file="DIR/s.q"),
            do("blockdev-snapshot-sync", device="no", snapshot_file="DIR/s.q"),
            do("blockdev-snapshot-sync", device="n", snapshot_file="DIR/s.q"),
            sync("no", device="n"),
            sync(overlay=None),
            sync(overlay=None, format="wat"),
            sync(overlay="t", format="wat"),
            sync(mode="wat"),
            *[sync(format=kind) for kind in ("wat", "", "raw", "file")],
            *[sync(format=kind, mode="existing") for kind in ("wat", "")],
            *[sync(snapshot_file=name) for name in ("", "DIR/none/x", "DIR", "wat:x", "DIR/n.img")],
            *[
                sync(snapshot_file=name, mode="existing")
                for name in ("", "DIR/none/x", "DIR", "DIR/u.img")
            ],
            sync(snapshot_file="DIR/small.img", mode="existing", format="raw"),
            *[Content(name) for name in ("n.img", "s.q", "none", "small.img")],
            *image("q"),
            Differs(sync(snapshot_file="DIR/q.q"), "ours names the file", refused(TAKEN)),
            Differs(
                sync(snapshot_file="DIR/q.q", mode="existing"),
                "ours names the file",
                refused(TAKEN),
            ),
            sync(),
            sync(overlay="again"),
        ],
    ),
    Scenario(
        "snapshot-transaction",
        [
            *LIVE,
            *image("q"),
            bitmap("b"),
            transaction(overlay_action("n", "q"), on_bitmap("add", "c", on="q"), ABORT),
            NODES,
            EXPORTS,
            transaction(overlay_action("n", "q"), on_bitmap("add", "c", on="q")),
            Write("n", 0, 10),
            Bitmaps("n"),
            Bitmaps("q"),
            NODES,
        ],
    ),
    Scenario(
        "snapshot-transaction-in-a-file",
        [
            *LIVE,
            bitmap("b"),
            Write("n", 0, 100),
            transaction(
                sync_action(),
                on_bitmap("add", "c", on="s"),
                on_bitmap("disable", "b"),
            ),
            Write("n", MIB, 10),
            Bitmaps("n"),
            Bitmaps("s"),
            NODES,
            Reads("n"),
        ],
    ),
    Scenario(
        "snapshot-transaction-chain",
        [
            *LIVE,
            *image("q"),
            *image("r"),
            transaction(overlay_action("n", "q"), overlay_action("q", "r")),
            Write("n", 0, 10),
            NODES,
            EXPORTS,
            Reads("n"),
        ],
    ),
    Scenario(
        "snapshot-transaction-with-a-backup",
        [
            *LIVE,
            node("t"),
            *image("q"),
            bitmap("b"),
            Write("n", 0, 100),
            transaction(backup_action(sync="incremental", bitmap="b"), overlay_action("n", "q")),
            ENDED,
            Write("n", 0, 100, b"x"),
            Content("t.img"),
            Bitmaps("n"),
            Reads("n"),
        ],
    ),
    Scenario(
        "snapshot-transaction-refusals",
        [
            *LIVE,
            *image("q"),
            node("t"),
            transaction(action("blockdev-snapshot", node="n")),
            transaction(overlay_action("n", "nor")),
            transaction(overlay_action("n", "q"), overlay_action("n", "q")),
            transaction(overlay_action("n", "q"), overlay_action("t", "q")),
            transaction(sync_action(), sync_action("t")),
            transaction(on_bitmap("add", "c", on="s"), sync_action()),
            grouped(overlay_action("n", "q")),
            grouped(sync_action()),
            NODES,
            EXPORTS,
            Reads("n"),
        ],
    ),
    Scenario(
        "image-in-use",
        [
            do("blockdev-add", node_name="f", driver="file", filename="DIR/q.q"),
            *image_file("q"),
            do("blockdev-add", node_name="f", **file("q.q")),
            opened("q", file="f"),
            server(),
            export("e", "f"),
            export("e", "f", writable=True),
            do("block_resize", node_name="f", size=MIB),
            opened("r", file="f"),
            opened("r", file="f", read_only=True),
            node("r", file="f"),
            export("e", "r", writable=True),
            delete("f"),
            delete("r"),
        ],
    ),
    Scenario(
        "image-in-a-file-in-use",
        [
            *image_file("q"),
            do("blockdev-add", node_name="f", **file("q.q")),
            server(),
            export("e", "f", writable=True),
            opened("q", file="f"),
            opened("q", file="f", read_only=True),
            unexport("e"),
            export("e", "f"),
            opened("q", file="f"),
            opened("q", file="f", read_only=True),
        ],
    ),
    Scenario(
        "image-in-a-read-only-file",
        [
            *image_file("q"),
            do("blockdev-add", node_name="f", read_only=True, **file("q.q")),
            opened("q", file="f"),
            opened("q", file="f", read_only=True),
            opened("r", file="f", read_only=True),
            NODES,
        ],
    ),
    Scenario(
        "backing-file-in-use",
        [
            node("n"),
            *image("q", backing="n"),
            server(),
            export("w", writable=True, name="w"),
            export("e", "q", writable=True, name="e"),
            Write("e", 0, 10),
            Write("w", 4096, 10),
            Reads("e"),
            without_guest("w"),
            delete("n"),
            do("block_resize", node_name="n", size=4 * MIB),
            node("t"),
            backup(device="q", speed=1),
            Asleep(),
            export("w", writable=True, name="w"),
            do("block-job-cancel", device="j"),
        ],
    ),
]
