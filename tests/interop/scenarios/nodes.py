"""blockdev-add, blockdev-del, and what the queries tell of nodes."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import Differs, Scenario, do
from tests.interop.words import (
    backup,
    delete,
    export,
    file,
    node,
    refused,
    server,
    slow_backup,
    status,
)

NODES = do("query-named-block-nodes")
FLAT = do("query-named-block-nodes", flat=True)
BAD_CHILDREN: list[Any] = [3, None, [], {}, {"driver": "raw"}]

SCENARIOS = [
    Scenario(
        "node-nested",
        [NODES, node("n"), NODES, FLAT, do("query-block"), delete("n"), NODES],
    ),
    Scenario(
        "node-by-name",
        [
            do("blockdev-add", node_name="f", **file("n.img")),
            node("n", file="f"),
            FLAT,
            delete("f"),
            delete("n"),
            delete("f"),
        ],
    ),
    Scenario(
        "node-inline-child-has-a-name",
        [
            node("n", file=file("n.img", **{"node-name": "f"})),
            FLAT,
            delete("f"),
            delete("n"),
            delete("f"),
        ],
    ),
    Scenario("node-file-alone", [do("blockdev-add", node_name="f", **file("n.img")), FLAT]),
    Scenario(
        "node-options-are-inherited",
        [
            node("n", read_only=True, cache={"direct": True, "no-flush": True}),
            node("t", discard="unmap"),
            node("small", file=file("small.img", cache={"direct": True})),
            FLAT,
        ],
    ),
    Scenario(
        "node-size-is-rounded-up",
        [node("odd"), do("query-named-block-nodes")],
    ),
    Scenario(
        "node-over-read-only-file",
        [
            do("blockdev-add", node_name="f", read_only=True, **file("n.img")),
            node("n", file="f"),
            server(),
            export("e"),
            export("w", name="w", writable=True),
        ],
    ),
    Scenario(
        "node-twice-over-one-file",
        [
            node("n"),
            Differs(
                node("again", file=file("n.img")),
                "what is written through one node would not be in the bitmaps of the other",
                refused(
                    "Failed to get \"write\" lock: is another process or node using 'DIR/n.img'?"
                ),
            ),
            Differs(
                delete("again"),
                "there is none",
                refused("Failed to find node with node-name='again'"),
            ),
            node("reader", file=file("n.img"), read_only=True),
        ],
    ),
    Scenario(
        "node-name-is-taken",
        [
            node("n"),
            node("n"),
            Differs(
                node("n", file=file("missing")),
                "ours looks at the name before it opens a file",
                refused("Duplicate nodes with node-name='n'"),
            ),
            node("x", file=file("t.img", **{"node-name": "x"})),
            node("x", file=file("t.img", **{"node-name": "n"})),
        ],
    ),
    Scenario(
        "node-names",
        [
            *[node(name, file=file("n.img")) for name in ("", "1a", "#a", "a b", "é", "-a")],
            node("a" * 31, file=file("n.img")),
            node("a" * 32, file=file("n.img")),
            node("a.b-c_d9", file=file("t.img")),
            do("blockdev-add", driver="raw", file=file("n.img")),
        ],
    ),
    Scenario(
        "node-files-that-can-not-be",
        [
            node("missing"),
            node("x", file=file("")),
            node("x", file=file("n.img/x")),
            node("x", file={"driver": "file", "filename": ""}),
            node("x", file={"driver": "file", "filename": "/dev/null"}),
            node("x", file={"driver": "host_device", "filename": "DIR/n.img"}),
            do("blockdev-add", driver="file", node_name="x", filename="DIR", read_only=True),
        ],
    ),
    Scenario("node-references-that-can-not-be", [node("x", file="nope"), node("x", file="x")]),
    Scenario(
        "node-arguments",
        [
            do("blockdev-add"),
            do("blockdev-add", driver="wat", node_name="x"),
            do("blockdev-add", driver=3, node_name="x"),
            do("blockdev-add", driver="raw", node_name="x"),
            do("blockdev-add", driver="file", node_name="x"),
            *[node("x", file=bad) for bad in BAD_CHILDREN],
            node("x", file={"driver": "raw", "file": {"driver": "file"}}),
            node("x", file={"driver": "raw", "file": {"driver": "file", "filename": 3}}),
            node("x", file=file("n.img", wat=1)),
            node("x", wat=1),
            *[node("x", cache=bad) for bad in (1, {"direct": "on"}, {"wat": True})],
            node("x", read_only="on"),
            node("x", discard="no"),
            node("x", discard=1),
            do("blockdev-add", driver="raw", node_name=5, file=file("n.img")),
            do("blockdev-del"),
            do("blockdev-del", node_name=3),
            do("blockdev-del", node_name="n", force=True),
        ],
    ),
    Scenario(
        "node-in-use",
        [
            node("n"),
            server(),
            export("e"),
            delete("n"),
            do("block-export-del", id="e"),
            delete("n"),
            delete("n"),
        ],
    ),
    Scenario(
        "node-in-use-by-a-job",
        [
            node("n"),
            node("t"),
            backup(auto_finalize=False),
            status("pending"),
            delete("n"),
            delete("t"),
            do("job-finalize", id="j"),
            delete("n"),
            delete("t"),
        ],
    ),
    Scenario(
        "node-is-free-when-its-job-is-concluded",
        [node("n"), node("t"), backup(auto_dismiss=False), status("concluded"), delete("t")],
    ),
    Scenario(
        "node-target-of-two-jobs",
        [
            node("n"),
            node("t"),
            node("m"),
            *slow_backup(),
            backup(job_id="k"),
            backup(job_id="k", device="m"),
            backup(job_id="k", device="t", target="m"),
        ],
    ),
]
