"""block_resize: what it takes, who is in its way, and what follows."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Content,
    Differs,
    Do,
    FileSizeLimit,
    Leave,
    Scenario,
    do,
)
from tests.interop.words import (
    CLUSTER,
    DISKS,
    GUEST_DISKS,
    TWO_WRITES,
    backup,
    bitmap,
    delete,
    export,
    file,
    node,
    refused,
    server,
    slow_backup,
    status,
    unexport,
)

NODES = do("query-named-block-nodes")
LARGEST = 2**63 - 2**30


def resize(name: str | None, size: Any, **options: Any) -> Do:
    named = {} if name is None else {"node_name": name}
    return do("block_resize", **named, size=size, **options)


def conflict(on: str, taker: str, keeper: str) -> str:
    return (
        f"Permission conflict on node '{on}': permissions 'resize' are both required by "
        f"{taker} and unshared by {keeper}."
    )


CLEAN = {
    "recording": True,
    "persistent": False,
    "busy": False,
    "granularity": CLUSTER,
    "count": 0,
}

#: A node for a file, and raw nodes over it: all of it, and a part.
SHARED = do("blockdev-add", node_name="f", **file("n.img"))


SCENARIOS = [
    Scenario(
        "resize-arguments",
        [
            node("n"),
            do("block_resize"),
            do("block_resize", node_name="n"),
            *[resize("n", size) for size in (-1, -512, "5", 1.0, None, True, 2**63, -(2**63))],
            resize(None, 5),
            resize("nope", -1),
            resize(None, 5, device="nope"),
            resize(None, 5, device="n"),
            resize("", 5, device="n"),
            resize("nope", 5, device="nada"),
            resize("n", 5 * MIB, device="nope"),
            resize("n", 4 * MIB, device=""),
            resize("n", 5, wat=1),
            do("block_resize", node_name=3, size=5),
            NODES,
        ],
    ),
    Scenario(
        "resize-sizes",
        [
            node("n"),
            *[
                step
                for size in (4 * MIB, 2 * MIB + 1, 512, 511, 1, 0, 3 * MIB)
                for step in (resize("n", size), NODES, Content("n.img"))
            ],
            *[resize("n", size) for size in (2**63 - 1, 2**63 - 512, LARGEST + 1)],
            resize("n", LARGEST),
            NODES,
        ],
    ),
    Scenario(
        "resize-past-the-file-size-limit",
        [
            node("n"),
            bitmap("b"),
            FileSizeLimit(4 * MIB),
            resize("n", 5 * MIB),
            NODES,
            FileSizeLimit(),
            resize("n", 5 * MIB),
            NODES,
        ],
    ),
    Scenario(
        "resize-read-only",
        [
            node("n", read_only=True),
            resize("n", 4 * MIB),
            resize("n", 2**63 - 1),
            do("blockdev-add", node_name="f", read_only=True, **file("t.img")),
            node("t", file="f"),
            resize("t", 4 * MIB),
            resize("f", 4 * MIB),
            NODES,
        ],
    ),
    Scenario(
        "resize-child-without-users",
        [
            SHARED,
            resize("f", 4 * MIB),
            node("n", file="f"),
            resize("n", 5 * MIB),
            NODES,
            resize("f", 6 * MIB),
            # The peer's "n" would keep its old size; see test_resize.py for ours.
            delete("n"),
            NODES,
        ],
    ),
    Scenario(
        "resize-window",
        [
            SHARED,
            node("w", file="f", offset=MIB),
            resize("w", 3 * MIB),
            NODES,
            resize("w", 512),
            NODES,
            resize("w", LARGEST),
            resize("f", 3 * MIB),
            delete("w"),
            resize("f", 3 * MIB),
            NODES,
        ],
    ),
    Scenario(
        "resize-window-of-fixed-size",
        [
            SHARED,
            node("w", file="f", offset=MIB, size=MIB),
            *[resize("w", size) for size in (512, MIB, 3 * MIB, 2**63 - 1)],
            resize("f", 4 * MIB),
            node("n", file="f"),
            resize("n", 4 * MIB),
            NODES,
        ],
    ),
    Scenario(
        "resize-bitmaps-follow",
        [
            *GUEST_DISKS,
            bitmap("b"),
            bitmap("fine", granularity=512),
            bitmap("off", disabled=True),
            *TWO_WRITES,
            Leave("n"),
            unexport("e"),
            Bitmaps("n"),
            resize("n", 5 * MIB),
            Bitmaps("n"),
            resize("n", MIB + 1),
            Bitmaps("n"),
            resize("n", 512),
            Bitmaps("n"),
            *[do("x-debug-block-dirty-bitmap-sha256", node="n", name=b) for b in ("b", "fine")],
        ],
    ),
    Scenario(
        "resize-there-and-back",
        [
            node("n"),
            bitmap("b"),
            bitmap("off", disabled=True),
            resize("n", MIB),
            Bitmaps("n"),
            resize("n", 4 * MIB),
            Differs(
                Bitmaps("n"),
                "what was cut off reads as zeroes now: an incremental backup must copy that",
                [
                    {
                        "bitmaps": [
                            {**CLEAN, "name": "off", "recording": False},
                            {**CLEAN, "name": "b", "count": 2 * MIB},
                        ]
                    }
                ],
            ),
            do("block-dirty-bitmap-clear", node="n", name="b"),
        ],
    ),
    Scenario(
        "resize-exported",
        [
            *GUEST_DISKS,
            resize("n", 4 * MIB),
            resize("n", MIB),
            resize("n", 3 * MIB),
            resize("n", 2**63 - 1),
            resize("n", -1),
            unexport("e"),
            resize("n", 4 * MIB),
            export("r"),
            resize("n", 3 * MIB),
            NODES,
        ],
    ),
    Scenario(
        "resize-below-an-export",
        [SHARED, node("n", file="f"), server(), export("e"), resize("f", 4 * MIB), NODES],
    ),
    Scenario(
        "resize-in-use-by-a-job",
        [
            *DISKS,
            bitmap("b"),
            *slow_backup(),
            Differs(
                resize("n", 4 * MIB),
                "ours has no node of its own over the source",
                refused(
                    conflict(
                        "n",
                        "an unnamed block device (uses node 'n' as 'root' child)",
                        "block job 'j' (uses node 'n' as 'source' child)",
                    )
                ),
            ),
            resize("t", 4 * MIB),
            resize("t", -1),
            resize("t", 2**63 - 1),
            NODES,
            do("block-job-cancel", device="j", force=True),
            backup(job_id="k", auto_finalize=False),
            status("pending", "k"),
            resize("t", 4 * MIB),
            do("job-finalize", id="k"),
            resize("n", 4 * MIB),
            resize("t", 4 * MIB),
            NODES,
        ],
    ),
]
