"""blockdev-reopen: what may change, who is in the way, and that a list is done whole or not."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Both,
    Content,
    Differs,
    Do,
    Leave,
    Scenario,
    Until,
    Write,
    do,
)
from tests.interop.words import (
    DISKS,
    GUEST_DISKS,
    backup,
    bitmap,
    export,
    file,
    node,
    refused,
    server,
    slow_backup,
    unexport,
)

NODES = do("query-named-block-nodes")
READ_ONLY: dict[str, Any] = {"read-only": True}
NOT_READ_ONLY: dict[str, Any] = {"read-only": 1}
BAD_LISTS: list[Any] = [3, {}, [3], [{}]]
BUSY = "Node '{}' is busy: block device is in use by block job: backup"
BUSY_WHY = "the job copies what the node was when it began, from where it was"
SIZE_WHY = "guests could not be told that their disk has another size"


def reopen(*options: Any) -> Do:
    return do("blockdev-reopen", options=list(options))


def raw(name: str = "n", below: Any = None, **options: Any) -> dict[str, Any]:
    """The raw node ``name``, over NAME.img as it was made, or over another node."""
    below = file(f"{name}.img") if below is None else below
    return {"driver": "raw", "node-name": name, "file": below, **options}


def named_file(name: str, image: str, **options: Any) -> dict[str, Any]:
    return file(image, **{"node-name": name}, **options)


NULL: dict[str, Any] = {"driver": "null-co", "node-name": "z", "size": MIB}


def throttle(group: str, **options: Any) -> dict[str, Any]:
    return {
        "driver": "throttle",
        "node-name": "f",
        "throttle-group": group,
        "file": "n",
        **options,
    }


def add(options: dict[str, Any]) -> Do:
    return Do("blockdev-add", options)


def size_conflict(name: str) -> str:
    return (
        f"Permission conflict on node '{name}': permissions 'resize' are both required by an "
        f"unnamed block device (uses node '{name}' as 'root' child) and unshared by an unnamed "
        f"block device (uses node '{name}' as 'root' child)."
    )


SCENARIOS = [
    Scenario(
        "reopen-arguments",
        [
            *DISKS,
            add(named_file("f", "m.img")),
            do("blockdev-reopen"),
            *[do("blockdev-reopen", options=bad) for bad in BAD_LISTS],
            do("blockdev-reopen", options=[], wat=1),
            reopen({"driver": "wat"}),
            reopen({"driver": "raw"}),
            reopen({"driver": "raw", "file": "f"}),
            reopen({"driver": "file", "filename": "DIR/m.img"}),
            reopen(raw("nope")),
            reopen(raw("nope", "f")),
            reopen({"driver": "raw", "node-name": "n"}),
            reopen(raw(wat=1)),
            reopen(raw(cache=1)),
            reopen(raw(**NOT_READ_ONLY)),
            reopen(named_file("n", "n.img")),
            reopen(named_file("f", "n.img")),
            reopen({**named_file("f", "m.img"), "driver": "host_device"}),
            reopen(raw(below="nope")),
            reopen(raw(below="n")),
            reopen(raw(below=file("m.img"))),
            reopen(raw(below={"driver": "host_device", "filename": "DIR/n.img"})),
            reopen(raw(below=named_file("x", "n.img"))),
            reopen(raw(offset=-1)),
            reopen(raw(size=-1)),
            reopen(raw(size=513)),
            reopen(raw(offset=4 * MIB)),
            reopen(raw(size=4 * MIB)),
            NODES,
        ],
    ),
    Scenario(
        "reopen-changes-nothing",
        [*DISKS, reopen(raw()), reopen(raw(), raw("t"), raw()), NODES],
    ),
    Scenario(
        "reopen-read-only-and-back",
        [
            *DISKS,
            server(),
            reopen(raw(**READ_ONLY)),
            NODES,
            export("w", writable=True),
            reopen(raw()),
            NODES,
            export("w", writable=True),
            Write("n", 0, 512),
            Content("n.img"),
            reopen(raw(**READ_ONLY)),
            reopen(raw("t", **READ_ONLY), raw(**READ_ONLY)),
            NODES,
        ],
    ),
    Scenario(
        "reopen-cache",
        [
            *GUEST_DISKS,
            Write("n", 0, 512),
            reopen(raw(cache={"direct": True, "no-flush": True})),
            NODES,
            Write("n", 700, 512),
            reopen(raw(below=file("n.img", cache={"direct": True}))),
            NODES,
            Write("n", 2000, 512),
            reopen(raw(discard="unmap")),
            Write("n", 4000, 512),
            Content("n.img"),
            NODES,
        ],
    ),
    Scenario(
        "reopen-window",
        [
            node("n"),
            reopen(raw(offset=4096)),
            NODES,
            reopen(raw(offset=4096, size=8192)),
            NODES,
            reopen(raw(size=MIB)),
            NODES,
        ],
    ),
    Scenario(
        "reopen-over-another-file",
        [
            *GUEST_DISKS,
            bitmap("b"),
            Write("n", 0, 512),
            add(named_file("f", "m.img")),
            add(named_file("r", "u.img", **READ_ONLY)),
            reopen(raw(below="f")),
            NODES,
            Write("n", MIB, 512),
            Content("n.img"),
            Content("m.img"),
            Bitmaps("n"),
            reopen(raw(below="r")),
            reopen(raw(below=file("m.img"))),
            reopen(named_file("f", "m.img", **READ_ONLY)),
            Leave("n"),
            unexport("e"),
        ],
    ),
    Scenario(
        "reopen-all-or-nothing",
        [
            *GUEST_DISKS,
            add(named_file("f", "m.img")),
            reopen(raw("t", **READ_ONLY), raw(below="f", **READ_ONLY)),
            reopen(raw("t", offset=512), named_file("f", "wrong.img")),
            reopen(raw("t", "f"), raw(below="nope")),
            reopen(raw("t", **READ_ONLY), raw("t", offset=5 * MIB)),
            NODES,
            add(raw("a", "f")),
            add(raw("b", "a")),
            reopen(raw("a", "t"), raw("t", "b")),
            reopen(raw("a", "b")),
            NODES,
        ],
    ),
    Scenario(
        "reopen-another-size-under-an-export",
        [
            *GUEST_DISKS,
            Differs(reopen(raw(offset=512)), SIZE_WHY, refused(size_conflict("n"))),
            reopen(raw()),
            NODES,
        ],
    ),
    Scenario(
        "reopen-under-a-job",
        [
            *DISKS,
            *slow_backup(),
            Differs(reopen(raw()), BUSY_WHY, refused(BUSY.format("n"))),
            Differs(reopen(raw("t")), BUSY_WHY, refused(BUSY.format("t"))),
            do("job-cancel", id="j"),
            reopen(raw(), raw("t", **READ_ONLY)),
            backup(),
            reopen(raw("t")),
        ],
    ),
    Scenario(
        "reopen-a-child",
        [
            add(named_file("f", "n.img")),
            node("n", file="f"),
            node("m", file=named_file("inline", "m.img")),
            server(),
            export("e", writable=True),
            reopen(named_file("f", "n.img", cache={"direct": True})),
            Write("n", 100, 512),
            Content("n.img"),
            reopen(named_file("inline", "m.img", **READ_ONLY)),
            reopen(raw("m", named_file("inline", "m.img"))),
            reopen(raw("m", file("m.img", **READ_ONLY))),
            NODES,
            reopen(raw("m", "f")),
            NODES,
        ],
    ),
    Scenario(
        "reopen-throttle",
        [
            *GUEST_DISKS,
            *(do("object-add", qom_type="throttle-group", id=group) for group in "gh"),
            add(throttle("g")),
            export("f", "f", writable=True),
            Write("f", 0, 512),
            reopen(throttle("h")),
            Write("f", 0, 512),
            do("object-del", id="g"),
            do("object-del", id="h"),
            reopen(throttle("nope")),
            reopen(throttle("h", **READ_ONLY)),
            Both(unexport("f", mode="hard"), Until("BLOCK_EXPORT_DELETED")),
            reopen(throttle("h", **READ_ONLY)),
            do("blockdev-del", node_name="f"),
        ],
    ),
    Scenario(
        "reopen-null",
        [
            add(NULL),
            reopen({**NULL, **READ_ONLY}),
            reopen({**NULL, "size": 2 * MIB}),
            reopen(NULL),
            do("blockdev-del", node_name="z"),
        ],
    ),
]
