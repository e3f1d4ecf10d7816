"""block-dirty-bitmap-*: what is refused, what is recorded, what a query shows."""

from __future__ import annotations

from tests.helpers.scenario import MIB, Bitmaps, Do, Scenario, Write, do
from tests.interop.words import (
    GUEST_DISKS,
    bitmap,
    each_bitmap_command,
    export,
    merge,
    node,
    not_kept,
    server,
    slow_backup,
)

KIB = 1024
COMMANDS = ("remove", "clear", "enable", "disable")
SHA256 = "x-debug-block-dirty-bitmap-sha256"


def sha256(on: str, name: str) -> Do:
    return do(SHA256, node=on, name=name)


SCENARIOS = [
    Scenario(
        "bitmap-add-and-remove",
        [
            node("n"),
            bitmap("a"),
            bitmap("b", granularity=512),
            bitmap("c", granularity=1 << 31),
            bitmap("d", disabled=True),
            Bitmaps("n"),
            *each_bitmap_command("n", "b", "remove", "remove"),
            bitmap("b"),
            Bitmaps("n"),
            do("query-block"),
        ],
    ),
    Scenario(
        "bitmap-names",
        [
            node("n"),
            bitmap("a"),
            bitmap("a"),
            bitmap(""),
            bitmap("ü ß/#1"),
            bitmap("x" * 1023),
            bitmap("x" * 1024),
        ],
    ),
    Scenario(
        "bitmap-granularity",
        [
            node("n"),
            *[
                bitmap("b", granularity=bad)
                for bad in (0, 1, 256, 511, 513, 1000, (1 << 31) + 1, 1 << 32, -1, -512)
            ],
            *[bitmap("b", granularity=bad) for bad in ("512", 512.0, None, 1 << 64)],
        ],
    ),
    Scenario(
        "bitmap-arguments",
        [
            node("n"),
            do("block-dirty-bitmap-add", node="n"),
            do("block-dirty-bitmap-add", name="b"),
            do("block-dirty-bitmap-add", node="n", name=3),
            bitmap("b", wat=1),
            bitmap("b", disabled="x"),
            bitmap("b", persistent=1),
            not_kept(bitmap("b", persistent=True)),
            *[do(f"block-dirty-bitmap-{command}", node="n") for command in COMMANDS],
            *[do(f"block-dirty-bitmap-{command}", node="n", name=[]) for command in COMMANDS],
        ],
    ),
    Scenario(
        "bitmap-unknown",
        [
            node("n"),
            bitmap("b", "nope"),
            bitmap("b", ""),
            *each_bitmap_command("nope", "b", *COMMANDS),
            *each_bitmap_command("n", "nope", *COMMANDS),
            *each_bitmap_command("n", "", *COMMANDS),
        ],
    ),
    Scenario(
        "bitmap-on-read-only-and-on-child",
        [
            node("n", read_only=True),
            node("t", file={"driver": "file", "filename": "DIR/t.img", "node-name": "f"}),
            bitmap("b"),
            bitmap("b", "f", granularity=4096),
            bitmap("b", "t", granularity=4096),
            server(),
            export("e", "t", writable=True),
            Write("t", 5000, 100),
            Bitmaps("f"),
            Bitmaps("t"),
        ],
    ),
    Scenario(
        "bitmap-records-writes",
        [
            node("n"),
            server(),
            export("e", writable=True),
            bitmap("fine", granularity=512),
            bitmap("coarse", granularity=MIB),
            bitmap("huge", granularity=1 << 31),
            bitmap("off", disabled=True),
            Write("n", 511, 2),
            Write("n", MIB - 1, 2),
            Bitmaps("n"),
            *each_bitmap_command("n", "fine", "disable", "disable"),
            Write("n", 2 * MIB, 512),
            Bitmaps("n"),
            *each_bitmap_command("n", "fine", "enable", "enable"),
            *each_bitmap_command("n", "coarse", "clear", "clear"),
            Write("n", 2 * MIB + 512, 512),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "bitmap-at-the-end-of-an-odd-disk",
        [
            node("odd"),
            bitmap("b", "odd", granularity=512),
            bitmap("c", "odd", granularity=65536),
            server(),
            export("e", "odd", writable=True),
            Write("odd", MIB, 512),
            Bitmaps("odd"),
        ],
    ),
    Scenario(
        "bitmap-merge",
        [
            node("n"),
            server(),
            export("e", writable=True),
            bitmap("a", granularity=512),
            Write("n", 0, 512),
            Write("n", 100 * KIB, 512),
            bitmap("b"),
            Write("n", MIB, 100 * KIB),
            bitmap("into", granularity=4096, disabled=True),
            merge("into", "a"),
            Bitmaps("n"),
            merge("into", "b", {"node": "n", "name": "a"}),
            Bitmaps("n"),
            merge("into", "into"),
            merge("a", "b"),
            merge("b", "into", "into"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "bitmap-merge-from-another-node",
        [
            node("n"),
            node("t"),
            node("small"),
            server(),
            export("e", "t", writable=True),
            bitmap("b"),
            bitmap("b", "t"),
            bitmap("b", "small"),
            Write("t", 0, 512),
            merge("b", {"node": "t", "name": "b"}),
            Bitmaps("n"),
            merge("b", {"node": "small", "name": "b"}),
            merge("b", {"node": "nope", "name": "b"}),
            merge("b", {"node": "small", "name": "nope"}),
        ],
    ),
    Scenario(
        "bitmap-merge-changes-all-or-nothing",
        [
            node("n"),
            server(),
            export("e", writable=True),
            bitmap("full"),
            Write("n", 0, MIB),
            bitmap("b"),
            merge("b", "full", "nope"),
            merge("nope", "full"),
            merge("full", "nope", on="nope"),
            Bitmaps("n"),
        ],
    ),
    Scenario(
        "bitmap-digests",
        [
            *GUEST_DISKS,
            bitmap("a"),
            bitmap("b", granularity=512),
            bitmap("off", disabled=True),
            sha256("nope", "a"),
            sha256("n", "nope"),
            sha256("", ""),
            do(SHA256, node="n"),
            do(SHA256, name="a"),
            do(SHA256, node="n", name="a", x=1),
            sha256("n", "a"),
            Write("n", 100000, 70000),
            Write("n", 3 * MIB - 1, 1),
            *[sha256("n", name) for name in ("a", "b", "off")],
            *slow_backup(sync="bitmap", bitmap="a", bitmap_mode="on-success"),
            sha256("n", "a"),
            Write("n", 2 * MIB, 1),
            sha256("n", "a"),
            do("job-cancel", id="j"),
            sha256("n", "a"),
        ],
    ),
    Scenario(
        "bitmap-merge-arguments",
        [
            node("n"),
            bitmap("b"),
            do("block-dirty-bitmap-merge", node="n", target="b"),
            do("block-dirty-bitmap-merge", node="n", target="b", bitmaps="b"),
            merge("b", 3),
            merge("b", {"name": "b"}),
            merge("b", {"node": "n"}),
            merge("b", {"node": "n", "name": "b", "x": 1}),
        ],
    ),
]
