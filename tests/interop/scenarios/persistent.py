"""Bitmaps that qcow2 images keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Both,
    Differs,
    Do,
    Leave,
    Scenario,
    Step,
    Until,
    Write,
    do,
)
from tests.interop.scenarios.create import created
from tests.interop.scenarios.transactions import ABORT, on_bitmap, transaction
from tests.interop.words import (
    ENDED,
    backup,
    bitmap,
    delete,
    each_bitmap_command,
    export,
    file,
    merge,
    node,
    not_kept,
    refused,
    server,
    unexport,
)

DISK_BYTES = 3 * MIB


def image(**options: Any) -> list[Step]:
    """A new qcow2 image in q.img, of the disk's size."""
    place = {"filename": "DIR/q.img", "size": 0}
    new: dict[str, Any] = {"file": file("q.img"), "size": DISK_BYTES}
    return [*created(driver="file", **place), *created(driver="qcow2", **{**new, **options})]


def qcow2(**options: Any) -> Do:
    return do("blockdev-add", driver="qcow2", node_name="n", file=file("q.img"), **options)


def reopen(**options: Any) -> Do:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    whole = {"driver": "qcow2", "node-name": "n", "file": file("q.img"), **named}
    return do("blockdev-reopen", options=[whole])


def overlay_image(name: str) -> list[Step]:
    """Another image of the disk's size, as a node."""
    place = {"filename": f"DIR/{name}.q", "size": 0}
    return [
        *created(driver="file", **place),
        *created(driver="qcow2", file=file(f"{name}.q"), size=DISK_BYTES),
        do("blockdev-add", driver="qcow2", node_name=name, file=file(f"{name}.q"), backing=None),
    ]


def reopened(**options: Any) -> list[Step]:
    return [delete("n"), qcow2(**options), Bitmaps("n")]


#: The export is gone; the reply may come before or after that.
NO_GUEST: list[Step] = [
    Both(unexport("e", mode="hard"), Until("BLOCK_EXPORT_DELETED", {"id": "e"}))
]

LONG_NAME = "é" * 512

LEAVE: Sequence[Step] = [delete("n")]

SCENARIOS = [
    Scenario(
        "persistent-come-back",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("b", persistent=True, granularity=512, disabled=True),
            bitmap("t"),
            server(),
            export("e", writable=True),
            Write("n", MIB, 4096),
            *NO_GUEST,
            Bitmaps("n"),
            *reopened(),
            *each_bitmap_command("n", "b", "enable"),
            *each_bitmap_command("n", "a", "disable", "clear"),
            *reopened(),
            *each_bitmap_command("n", "a", "remove"),
            Bitmaps("n"),
            bitmap("a", persistent=True),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-names",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("a", persistent=True),
            bitmap("a"),
            bitmap("", persistent=True),
            bitmap("é" * 511 + "x", persistent=True),
            Differs(
                bitmap(LONG_NAME, persistent=True),
                "the peer has other words where it is persistent",
                refused(f"Bitmap name too long: {LONG_NAME}"),
            ),
            bitmap("g", persistent=True, granularity=1000),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-in-what-cannot",
        [
            node("n"),
            not_kept(bitmap("a", persistent=True)),
            delete("n"),
            *image(version="v2"),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("t"),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-read-only",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("off", persistent=True, disabled=True),
            *reopened(read_only=True),
            *each_bitmap_command("n", "a", "clear", "remove", "disable", "enable"),
            bitmap("a", persistent=True),
            bitmap("t"),
            merge("a", "off"),
            merge("t", "off"),
            node("t"),
            backup(sync="bitmap", bitmap="a", bitmap_mode="on-success"),
            backup(sync="bitmap", bitmap="a", bitmap_mode="never"),
            ENDED,
            Differs(
                bitmap("p", persistent=True),
                "the peer takes it, and loses it in the end",
                refused("Can't make bitmap 'p' persistent in 'n': No write access"),
            ),
            delete("n"),
            qcow2(),
            Bitmaps("n"),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-after-a-backup",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("b", persistent=True),
            node("t"),
            server(),
            export("e", writable=True),
            Write("n", MIB, 4096),
            backup(sync="incremental", bitmap="a"),
            ENDED,
            Write("n", 2 * MIB, 4096),
            *NO_GUEST,
            Bitmaps("n"),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-resized",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True, granularity=512),
            do("block_resize", node_name="n", size=5 * MIB),
            *reopened(),
            do("block_resize", node_name="n", size=MIB),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-in-transactions",
        [
            *image(),
            qcow2(),
            transaction(
                on_bitmap("add", "a", persistent=True),
                on_bitmap("add", "b", persistent=True, disabled=True),
                on_bitmap("add", "t"),
            ),
            Bitmaps("n"),
            *reopened(),
            transaction(on_bitmap("add", "c", persistent=True), ABORT),
            transaction(on_bitmap("add", "c", persistent=True), on_bitmap("add", "a")),
            Bitmaps("n"),
            transaction(on_bitmap("remove", "a"), on_bitmap("clear", "a")),
            transaction(on_bitmap("remove", "a"), on_bitmap("add", "a", persistent=True)),
            transaction(on_bitmap("remove", "a"), ABORT),
            Bitmaps("n"),
            *reopened(),
            transaction(on_bitmap("remove", "b"), on_bitmap("clear", "a")),
            Bitmaps("n"),
            *reopened(),
            transaction(on_bitmap("remove", "a")),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-reopened",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("t"),
            server(),
            export("e", writable=True),
            Write("n", MIB, 512),
            Leave("n"),
            *NO_GUEST,
            reopen(read_only=True),
            Bitmaps("n"),
            *each_bitmap_command("n", "a", "clear", "remove", "disable", "enable"),
            export("e", writable=True),
            reopen(),
            Bitmaps("n"),
            export("e", writable=True),
            Write("n", 2 * MIB, 512),
            bitmap("b", persistent=True, disabled=True),
            Bitmaps("n"),
            *each_bitmap_command("n", "a", "disable"),
            Leave("n"),
            *NO_GUEST,
            reopen(discard="unmap", cache={"no-flush": True}),
            Bitmaps("n"),
            reopen(read_only=True),
            Bitmaps("n"),
            *reopened(read_only=True),
            reopen(),
            Bitmaps("n"),
            *each_bitmap_command("n", "a", "enable", "remove"),
            *reopened(),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-reopened-with-a-backing-file",
        [
            *overlay_image("base"),
            *image(),
            qcow2(backing="base"),
            bitmap("a", persistent=True),
            reopen(backing="base", read_only=True),
            Bitmaps("n"),
            reopen(backing="base"),
            Bitmaps("n"),
            reopen(backing="nope"),
            delete("base"),
            *LEAVE,
        ],
    ),
    Scenario(
        "persistent-under-an-overlay",
        [
            *image(),
            qcow2(),
            bitmap("a", persistent=True),
            bitmap("off", persistent=True, disabled=True),
            bitmap("t"),
            *overlay_image("o"),
            server(),
            export("e", writable=True),
            Write("n", 0, 512),
            do("blockdev-snapshot", node="n", overlay="o"),
            Write("n", MIB, 512),
            Bitmaps("n"),
            *each_bitmap_command("n", "a", "clear", "remove", "disable", "enable"),
            *each_bitmap_command("n", "t", "clear", "remove"),
            *NO_GUEST,
            delete("o"),
            *reopened(),
            *LEAVE,
        ],
    ),
]
