"""blockdev-create: files and qcow2 images, and what is refused."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import MIB, Content, Differs, Do, Scenario, Step, do
from tests.helpers.tidy import Message
from tests.interop.words import delete, export, file, node, server, status

JOBS = do("query-jobs")
DISMISS = do("job-dismiss", id="j")


def create(job: str = "j", **options: Any) -> Do:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return do("blockdev-create", job_id=job, options=named)


def created(**options: Any) -> list[Step]:
    """A creation as job ``j`` until it is dismissed, and how it went."""
    return [create(**options), status("concluded"), JOBS, DISMISS]


def new_file(name: str = "new.img", **options: Any) -> list[Step]:
    return created(driver="file", **{"filename": f"DIR/{name}", "size": MIB, **options})


def qcow2(**options: Any) -> list[Step]:
    return created(driver="qcow2", **{"file": "f", "size": MIB, **options})


def failed(description: str) -> list[Message]:
    """The row of a creation that failed."""
    row = {"current-progress": 1, "status": "concluded", "total-progress": 1, "type": "create"}
    return [{"return": [{**row, "id": "j", "error": description}]}]


def other_words(steps: list[Step], why: str, description: str) -> list[Step]:
    """A creation that fails with words of ours."""
    return [Differs(step, why, failed(description)) if step is JOBS else step for step in steps]


def changes(*statuses: str) -> list[Message]:
    return [
        {"event": "JOB_STATUS_CHANGE", "data": {"status": each, "id": "j"}} for each in statuses
    ]


_CUT_OFF = "the peer cuts off the file under its own node"
_IN_USE = "Failed to get \"write\" lock: is another process or node using 'DIR/n.img'?"

F = do("blockdev-add", node_name="f", **file("new.img"))
IMAGE: list[Step] = [*new_file(size=0), F]

SCENARIOS = [
    Scenario(
        "create-file",
        [
            *new_file(),
            Content("new.img"),
            *new_file(size=1000),
            Content("new.img"),
            *new_file(size=2 * MIB, preallocation="falloc"),
            *new_file(size=2 * MIB, preallocation="full"),
            Content("new.img"),
            *new_file("n.img"),
            Content("n.img"),
        ],
    ),
    Scenario(
        "create-file-fails",
        [
            *new_file("none/new.img"),
            *new_file(size=-5),
            *new_file(size=1 << 63),
            *new_file(preallocation="metadata"),
            *created(driver="file", filename="", size=MIB),
            *created(driver="file", filename="DIR", size=MIB),
            Differs(Content("new.img"), "the peer leaves an empty file", [{"file": "none"}]),
        ],
    ),
    Scenario(
        "create-file-in-use",
        [
            node("n"),
            create(driver="file", filename="DIR/n.img", size=MIB),
            Differs(status("concluded"), _CUT_OFF, changes("aborting", "concluded")),
            Differs(JOBS, _CUT_OFF, failed(_IN_USE)),
            DISMISS,
        ],
    ),
    Scenario(
        "create-takes",
        [
            create("1", driver="file", filename="DIR/x", size=1),
            create(driver="raw"),
            create(driver="host_device"),
            create(driver="raw", size=1),
            create(driver="wat"),
            create(),
            create(driver="qcow2"),
            create(driver="qcow2", file="f"),
            create(driver="qcow2", file=3, size=1),
            create(driver="qcow2", file="f", size="3"),
            create(driver="qcow2", file="f", size=1 << 64),
            create(driver="qcow2", file="f", size=1, version="v9"),
            create(driver="qcow2", file="f", size=1, backing_fmt="wat"),
            create(driver="qcow2", file="f", size=1, compression_type="lz4"),
            create(driver="qcow2", file="f", size=1, preallocation="x"),
            create(driver="qcow2", file="f", size=1, wat=1),
            do("blockdev-create", options={"driver": "raw"}),
            do("blockdev-create", job_id="j"),
        ],
    ),
    Scenario(
        "create-is-no-block-job",
        [
            create(driver="file", filename="DIR/new.img", size=MIB),
            status("concluded"),
            do("query-block-jobs"),
            do("block-job-dismiss", id="j"),
            do("block-job-cancel", device="j"),
            do("job-cancel", id="j"),
            do("job-pause", id="j"),
            do("job-finalize", id="j"),
            create(driver="file", filename="DIR/new.img", size=MIB),
            DISMISS,
        ],
    ),
    Scenario(
        "create-qcow2",
        [
            *IMAGE,
            *qcow2(),
            *qcow2(version="v2", size=0),
            *qcow2(backing_file="none.img", backing_fmt="raw"),
            *qcow2(backing_file="none.img"),
            *qcow2(preallocation="full", cluster_size=512),
            *qcow2(refcount_bits=1, lazy_refcounts=True, extended_l2=True),
            *qcow2(compression_type="zstd"),
            *qcow2(file=file("t.img")),
            delete("f"),
        ],
    ),
    Scenario(
        "create-qcow2-fails",
        [
            *IMAGE,
            *qcow2(file="none"),
            *qcow2(file=file("none")),
            *qcow2(size=1000),
            *qcow2(size=-512),
            *qcow2(size=1 << 62),
            *qcow2(size=(1 << 63) - 512),
            *qcow2(cluster_size=1000),
            *qcow2(cluster_size=-1),
            *qcow2(cluster_size=4 * MIB),
            *qcow2(cluster_size=8192, extended_l2=True),
            *qcow2(version="v2", extended_l2=True),
            *qcow2(version="v2", lazy_refcounts=True),
            *qcow2(version="v2", refcount_bits=1),
            *qcow2(version="v2", compression_type="zstd"),
            *qcow2(refcount_bits=3),
            *qcow2(refcount_bits=0),
            *qcow2(refcount_bits=-1),
            *qcow2(refcount_bits=128),
            *qcow2(backing_fmt="raw"),
            *qcow2(backing_file="x", preallocation="full"),
            *qcow2(data_file_raw=True),
            *qcow2(data_file="none"),
            *other_words(
                qcow2(backing_file="x" * 1024),
                "the peer repeats the whole name",
                "Backing file name too long",
            ),
            *other_words(
                qcow2(backing_file="x" * 500, cluster_size=512),
                "the peer says: No space left on device",
                "The image's header and the names in it don't fit into a cluster of 512 bytes; "
                "use larger clusters or shorter names",
            ),
            delete("f"),
        ],
    ),
    Scenario(
        "create-qcow2-in-what-cannot-be-written",
        [
            do("blockdev-add", node_name="f", read_only=True, **file("n.img")),
            *qcow2(),
            Content("n.img"),
        ],
    ),
    Scenario(
        "create-qcow2-under-a-raw-node",
        [*IMAGE, node("r", file="f"), *qcow2(), *qcow2(file="r"), delete("r"), delete("f")],
    ),
    Scenario(
        "create-qcow2-under-a-guest",
        [
            *IMAGE,
            node("r", file="f"),
            server(),
            export("e", on="r", writable=True),
            *qcow2(file="r"),
            *qcow2(),
        ],
    ),
]
