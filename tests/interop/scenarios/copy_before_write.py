"""Stories about ``copy-before-write`` and ``snapshot-access``.

They end with the nodes taken away: QEMU's queries show the bitmaps inside its filter.
"""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Content,
    Differs,
    Do,
    Leave,
    Read,
    Scenario,
    Step,
    Write,
    do,
)
from tests.interop.words import (
    CLUSTER,
    DISKS,
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

FAILING = {
    "driver": "blkdebug",
    "image": file("t.img"),
    "inject-error": [{"event": "none", "iotype": "write", "errno": 28}],
}


RAW = {"driver": "raw", "node-name": "n"}


def keep(name: str = "c", **options: Any) -> Do:
    """The filter ``c`` over ``n``, which copies to ``t``."""
    defaults = {"driver": "copy-before-write", "node_name": name, "file": "n", "target": "t"}
    return do("blockdev-add", **{**defaults, **options})


def access(**options: Any) -> Do:
    """The node ``s``: the snapshot that ``c`` keeps."""
    defaults = {"driver": "snapshot-access", "node_name": "s", "file": "c"}
    return do("blockdev-add", **{**defaults, **options})


#: A guest may write through ``c``, and a backup client read ``s``.
EXPORTED: list[Step] = [access(), server(), export("g", "c", writable=True), export("b", "s")]

KEPT: list[Step] = [*DISKS, keep(), *EXPORTED]

#: Clients leave, and the nodes go from the top down.
TAKEN_DOWN: list[Step] = [
    *(Leave(each) for each in "cs"),
    unexport("g"),
    delete("c"),
    unexport("b"),
    *(delete(each) for each in ("n", "t", "s", "t", "c", "t")),
]

WHOLE = Read("s", 0, 3 * MIB)


def refuses(command: Do, why: str, words: str) -> list[Step]:
    """What the peer takes and ours does not; then it is taken away there."""
    name = command.arguments["node-name"]
    gone = refused(f"Failed to find node with node-name='{name}'")
    return [Differs(command, why, refused(words)), Differs(delete(name), why, gone)]


SCENARIOS = [
    Scenario(
        "snapshot-stays",
        [
            *KEPT,
            Write("c", 100, 10),
            Write("c", MIB - 5, 200000),
            Write("c", 3 * MIB - 1, 1),
            WHOLE,
            Read("c", 0, 3 * MIB),
            Content("t.img"),
            *TAKEN_DOWN,
        ],
    ),
    Scenario(
        "snapshot-of-what-a-bitmap-names",
        [
            *DISKS,
            bitmap("b", granularity=CLUSTER),
            server(),
            export("e", writable=True),
            Write("n", 100, 10),
            Write("n", 2 * MIB, CLUSTER),
            Leave("n"),
            unexport("e"),
            keep(bitmap={"node": "n", "name": "b"}),
            do("block-dirty-bitmap-remove", node="n", name="b"),
            access(),
            export("g", "c", writable=True),
            export("b", "s"),
            Write("c", 0, 3 * MIB),
            Read("s", 0, CLUSTER),
            Read("s", 2 * MIB, CLUSTER),
            Content("t.img"),
            *TAKEN_DOWN,
        ],
    ),
    Scenario(
        "failed-copy-fails-the-write",
        [
            node("n"),
            node("t", file=FAILING),
            keep(),
            *EXPORTED,
            Write("c", 0, 512),
            Write("c", MIB, CLUSTER),
            WHOLE,
            Content("n.img"),
            *TAKEN_DOWN,
        ],
    ),
    Scenario(
        "failed-copy-breaks-the-snapshot",
        [
            node("n"),
            node("t", file=FAILING),
            keep(on_cbw_error="break-snapshot"),
            access(),
            server(),
            export("g", "c", writable=True),
            Write("c", 0, 512),
            Write("c", MIB, CLUSTER),
            Content("n.img"),
            node("u"),
            backup(device="s", target="u"),
            ENDED,
            Leave("c"),
            unexport("g"),
            *(delete(each) for each in "sctnu"),
        ],
    ),
    Scenario(
        "snapshot-backed-up",
        [
            *KEPT,
            WHOLE,
            Write("c", MIB, 200000),
            node("u"),
            backup(device="s", target="u"),
            ENDED,
            Content("u.img"),
            *TAKEN_DOWN,
        ],
    ),
    Scenario(
        "snapshot-refused",
        [
            *DISKS,
            keep(file="nope"),
            keep(target="nope"),
            keep(bitmap={"node": "nope", "name": "b"}),
            keep(bitmap={"node": "n", "name": "b"}),
            keep(on_cbw_error="wat"),
            keep(cbw_timeout=-1),
            keep(cbw_timeout=1 << 32),
            keep(min_cluster_size=3),
            keep(wat=1),
            do("blockdev-add", driver="copy-before-write", node_name="c", file="n"),
            do("blockdev-add", driver="copy-before-write", node_name="c", target="t"),
            keep(target=file("missing")),
            node("small"),
            bitmap("b", on="small"),
            keep(bitmap={"node": "small", "name": "b"}),
            node("ro", file=file("u.img"), read_only=True),
            keep(target="ro"),
            access(file="nope"),
            keep(read_only=True),
            server(),
            export("g", "c", writable=True),
            delete("c"),
            Bitmaps("small"),
        ],
    ),
    Scenario(
        "snapshot-refused-by-ours-alone",
        [
            *DISKS,
            node("small"),
            *refuses(
                keep(target="n"),
                "old data can't be kept in what is overwritten",
                "Source and target cannot be the same",
            ),
            *refuses(
                keep(target="small"),
                "the peer's guests fail when they write beyond the target's end",
                "Target 'small' is smaller than 'n'",
            ),
            *refuses(
                access(file="n"),
                "the peer's node fails every read",
                "Node 'n' is no 'copy-before-write' filter",
            ),
            Differs(
                keep(min_cluster_size=1 << 63),
                "ours bounds the memory that one cluster takes",
                refused(
                    "Cannot create block-copy-state: min-cluster-size too large: "
                    f"{1 << 63} > {16 * MIB}"
                ),
            ),
        ],
    ),
    Scenario(
        "snapshot-and-who-else-uses-the-nodes",
        [
            *DISKS,
            keep(),
            access(),
            server(),
            Differs(
                export("e", writable=True),
                "ours keeps what is overwritten by whomever, so the guest may stay where it is",
                [{"return": {}}],
            ),
            Differs(
                unexport("e"),
                "the peer has no such export",
                [
                    {"event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}},
                    {"return": {}},
                ],
            ),
            export("r", name="r"),
            export("w", "t", writable=True),
            do("block_resize", node_name="s", size=4 * MIB),
            unexport("r"),
            unexport("w"),
            do("block_resize", node_name="n", size=4 * MIB),
            do("block_resize", node_name="t", size=4 * MIB),
            *(delete(each) for each in ("n", "t", "c", "s", "c", "t", "n")),
        ],
    ),
    Scenario(
        "snapshot-slid-under-a-guest",
        [
            node("nf", file=file("n.img")),
            node("n", file="nf"),
            node("t"),
            server(),
            export("e", writable=True),
            Write("n", 0, 10, b"1"),
            keep(file="nf"),
            do("blockdev-reopen", options=[{**RAW, "file": "c"}]),
            access(),
            export("b", "s"),
            Write("n", 0, 10, b"2"),
            Write("n", MIB, 10, b"2"),
            WHOLE,
            Read("n", 0, 3 * MIB),
            Leave("s"),
            unexport("b"),
            delete("s"),
            do("blockdev-reopen", options=[{**RAW, "file": "nf"}]),
            delete("c"),
            Write("n", 2 * MIB, 10, b"3"),
            Read("n", 0, 3 * MIB),
            Content("t.img"),
        ],
    ),
]
