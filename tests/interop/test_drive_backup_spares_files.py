"""drive-backup and files that are somebody's data: a refused command changes nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.qmp_client import QmpClient, QmpError

KIB = 1024
DISK = random.Random(1).randbytes(256 * KIB)
#: Of another size than the disk, so that nothing can be done to it unseen.
GOOD = random.Random(2).randbytes(300 * KIB + 5)


@pytest.fixture
def qmp(daemon: Daemon) -> Iterator[QmpClient]:
    """A client of a daemon that has a disk with two bitmaps, one of them in use by a job."""
    (daemon.directory / "disk.img").write_bytes(DISK)
    with QmpClient(daemon.qmp_path) as qmp:
        add_node(qmp, "file", daemon.directory / "disk.img")
        qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": "file"})
        for name in ("b", "busy"):
            qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": name})
        yield qmp


def add_node(qmp: QmpClient, name: str, path: Path, *, read_only: bool = False) -> None:
    qmp.execute(
        "blockdev-add",
        {"driver": "file", "node-name": name, "filename": str(path), "read-only": read_only},
    )


def drive_backup(qmp: QmpClient, target: Path | str, **more: Any) -> None:
    """Members' names are written with ``_`` for ``-``."""
    arguments = {"job-id": "j", "device": "disk", "target": str(target), "sync": "full"}
    arguments |= {"format": "raw", "mode": "absolute-paths"}
    arguments |= {member.replace("_", "-"): value for member, value in more.items()}
    qmp.execute("drive-backup", arguments)


def listing(directory: Path) -> set[str]:
    """The images there, and the marks beside them."""
    return {each.name for each in directory.iterdir() if ".img" in each.name}


REFUSED: dict[str, dict[str, Any]] = {
    "a negative speed": {"speed": -1},
    "a job id that is taken": {"job_id": "taken"},
    "a job id that is none": {"job_id": "-x"},
    "no such disk": {"device": "nothing"},
    "no such bitmap": {"bitmap": "nothing", "bitmap_mode": "on-success"},
    "a bitmap without a mode": {"bitmap": "b"},
    "a mode without a bitmap": {"bitmap_mode": "always"},
    "a bitmap in use": {"sync": "incremental", "bitmap": "busy", "bitmap_mode": "on-success"},
    "incremental without a bitmap": {"sync": "incremental"},
    "another format": {"format": "vmdk"},
    "another policy": {"on_target_error": "nothing"},
}


def leave_a_job(qmp: QmpClient, directory: Path) -> None:
    """A job that has copied all, and keeps its id and its bitmap until it is finalized."""
    drive_backup(
        qmp,
        directory / "other.img",
        job_id="taken",
        bitmap="busy",
        bitmap_mode="on-success",
        auto_finalize=False,
    )
    qmp.wait_event("JOB_STATUS_CHANGE", id="taken", status="pending")


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_command_touches_no_file(
    daemon: Daemon, qmp: QmpClient, arguments: dict[str, Any]
) -> None:
    leave_a_job(qmp, daemon.directory)
    check_refused(daemon, qmp, arguments)


def test_a_conflict_of_permissions_touches_no_file(daemon: Daemon, qmp: QmpClient) -> None:
    address = {"type": "unix", "data": {"path": str(daemon.directory / "nbd.sock")}}
    qmp.execute("nbd-server-start", {"addr": address})
    qmp.execute(
        "block-export-add", {"type": "nbd", "id": "e", "node-name": "file", "writable": True}
    )
    check_refused(daemon, qmp, {}, "Permission conflict on node 'file'")


def check_refused(
    daemon: Daemon, qmp: QmpClient, arguments: dict[str, Any], why: str | None = None
) -> None:
    """Once for a file that is there, which is spared, and once for one that is not, nor will be."""
    good, new = daemon.directory / "good.img", daemon.directory / "new.img"
    good.write_bytes(GOOD)
    before = listing(daemon.directory)
    nodes = qmp.execute("query-named-block-nodes")
    for target in (good, new):
        with pytest.raises(QmpError, match=why):
            drive_backup(qmp, target, **arguments)
    assert good.read_bytes() == GOOD
    assert listing(daemon.directory) == before
    assert [row["node-name"] for row in qmp.execute("query-named-block-nodes")] == [
        row["node-name"] for row in nodes
    ]


def test_what_is_refused_first_may_be_done_then(daemon: Daemon, qmp: QmpClient) -> None:
    """So the file above was one that could have been overwritten."""
    good = daemon.directory / "good.img"
    good.write_bytes(GOOD)
    with pytest.raises(QmpError):
        drive_backup(qmp, good, speed=-1)
    drive_backup(qmp, good)
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert good.read_bytes() == DISK


# -- the source itself -----------------------------------------------------------------------------


def same_path(source: Path, _: Path) -> str:
    return str(source)


def with_protocol(source: Path, _: Path) -> str:
    return f"file:{source}"


def hard_link(source: Path, other: Path) -> str:
    os.link(source, other)
    return str(other)


def symlink(source: Path, other: Path) -> str:
    other.symlink_to(source)
    return str(other)


each_name = pytest.mark.parametrize("name", [same_path, with_protocol, hard_link, symlink])
read_only_or_not = pytest.mark.parametrize("read_only", [False, True], ids=["writable", "readonly"])


@each_name
@read_only_or_not
@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_a_disk_is_no_target_of_its_own_backup(
    daemon: Daemon, qmp: QmpClient, name: Any, mode: str, *, read_only: bool
) -> None:
    source = daemon.directory / "source.img"
    source.write_bytes(DISK)
    target = name(source, daemon.directory / "other.img")
    add_node(qmp, "source", source, read_only=read_only)
    before = listing(daemon.directory)
    with pytest.raises(QmpError):
        drive_backup(qmp, target, device="source", mode=mode)
    assert source.read_bytes() == DISK
    assert listing(daemon.directory) == before
    assert qmp.execute("query-jobs") == []


@each_name
@read_only_or_not
def test_nor_is_the_disk_below_a_window_of_it(
    daemon: Daemon, qmp: QmpClient, name: Any, *, read_only: bool
) -> None:
    source = daemon.directory / "source.img"
    source.write_bytes(DISK)
    target = name(source, daemon.directory / "other.img")
    add_node(qmp, "source", source, read_only=read_only)
    window = {"driver": "raw", "node-name": "window", "file": "source", "offset": 512}
    qmp.execute("blockdev-add", window | {"size": 64 * KIB, "read-only": read_only})
    with pytest.raises(QmpError):
        drive_backup(qmp, target, device="window", mode="existing")
    assert source.read_bytes() == DISK
    assert qmp.execute("query-jobs") == []


@pytest.mark.parametrize("name", [same_path, hard_link, symlink])
@pytest.mark.parametrize("source", ["reader", "above-reader", "window"])
def test_two_nodes_on_one_file_are_one_disk(
    daemon: Daemon, qmp: QmpClient, name: Any, source: str
) -> None:
    image = daemon.directory / "source.img"
    image.write_bytes(DISK)
    add_node(qmp, "reader", image, read_only=True)
    add_node(qmp, "writer", Path(name(image, daemon.directory / "other.img")))
    above = {"driver": "raw", "file": "reader", "read-only": True}
    window = {"node-name": "window", "offset": 512, "size": 64 * KIB}
    qmp.execute("blockdev-add", above | {"node-name": "above-reader"})
    qmp.execute("blockdev-add", above | window)
    size = 64 * KIB if source == "window" else len(DISK)
    target = {"driver": "raw", "node-name": "target", "file": "writer", "size": size}
    qmp.execute("blockdev-add", target)
    with pytest.raises(QmpError):
        qmp.execute(
            "blockdev-backup", {"job-id": "j", "device": source, "target": "target", "sync": "full"}
        )
    assert image.read_bytes() == DISK
    assert qmp.execute("query-jobs") == []


# -- the job's own target --------------------------------------------------------------------------


def test_nobody_else_uses_the_target_of_a_drive_backup(daemon: Daemon, qmp: QmpClient) -> None:
    """It goes with the job, so nothing may come to stand on it."""
    target = daemon.directory / "target.img"
    address = {"type": "unix", "data": {"path": str(daemon.directory / "nbd.sock")}}
    qmp.execute("nbd-server-start", {"addr": address})
    before = {row["node-name"] for row in qmp.execute("query-named-block-nodes")}
    drive_backup(qmp, target, auto_finalize=False)
    qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="pending")
    after = {row["node-name"] for row in qmp.execute("query-named-block-nodes")}
    made = sorted(after - before)
    assert len(made) == 2
    for name in made:
        check_unusable(qmp, name)
    qmp.execute("job-finalize", {"id": "j"})
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
    assert target.read_bytes() == DISK
    assert {row["node-name"] for row in qmp.execute("query-named-block-nodes")} == before


def check_unusable(qmp: QmpClient, name: str) -> None:
    export = {"type": "nbd", "id": "e", "name": "e", "node-name": name}
    backup = {"job-id": "k", "device": "disk", "target": name, "sync": "full"}
    for command, arguments in (
        ("block-export-add", export),
        ("block-export-add", export | {"writable": True}),
        ("blockdev-add", {"driver": "raw", "node-name": "above", "file": name}),
        ("blockdev-del", {"node-name": name}),
        ("blockdev-backup", backup),
        ("blockdev-backup", backup | {"device": name, "target": "disk"}),
        ("drive-backup", {**backup, "device": name, "target": "/nonexistent/file"}),
        ("block-dirty-bitmap-add", {"node": name, "name": "b"}),
    ):
        with pytest.raises(QmpError):
            qmp.execute(command, arguments)
