"""What becomes of a backup whose target file somebody else deletes, replaces or cuts meanwhile."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.qmp_client import QmpClient, QmpError

KIB = 1024
DISK = random.Random(1).randbytes(256 * KIB)


@pytest.fixture
def qmp(daemon: Daemon) -> Iterator[QmpClient]:
    """A client of a daemon that has a disk, ``disk``, with a bitmap, ``b``."""
    (daemon.directory / "disk.img").write_bytes(DISK)
    with QmpClient(daemon.qmp_path) as qmp:
        add_node(qmp, "disk", daemon.directory / "disk.img")
        qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": "b"})
        yield qmp


def add_node(qmp: QmpClient, name: str, path: Path) -> None:
    file = {"driver": "file", "filename": str(path)}
    qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})


def start(qmp: QmpClient, command: str, target: str, **more: Any) -> None:
    """Start job ``j``, which waits at its end for ``job-finalize``."""
    arguments = {"job-id": "j", "device": "disk", "target": target, "sync": "full"}
    qmp.execute(command, arguments | {"auto-finalize": False} | more)
    qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="pending")


def finish(qmp: QmpClient) -> str | None:
    qmp.execute("job-finalize", {"id": "j"})
    error: str | None = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"].get("error")
    return error


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(DISK)
    os.rename(other, path)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def grow(path: Path) -> None:
    os.truncate(path, len(DISK) + 4096)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "deleted": (delete, "The target 'PATH' is gone: No such file or directory"),
    "replaced": (replace, "The target 'PATH' was replaced by another file meanwhile"),
    "cut": (
        cut,
        "The target 'PATH' was resized meanwhile: it has 1000 bytes instead of 262144",
    ),
    "grown": (
        grow,
        "The target 'PATH' was resized meanwhile: it has 266240 bytes instead of 262144",
    ),
}


@pytest.mark.parametrize(("damage", "error"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("command", ["drive-backup", "blockdev-backup"])
def test_a_backup_that_nobody_could_restore_fails(
    daemon: Daemon, qmp: QmpClient, command: str, damage: Callable[[Path], None], error: str
) -> None:
    path = daemon.directory / "target.img"
    if command == "drive-backup":
        start(qmp, command, str(path), format="raw")
    else:
        path.write_bytes(bytes(len(DISK)))
        add_node(qmp, "target", path)
        start(qmp, command, "target")
    assert path.read_bytes() == DISK
    damage(path)
    assert finish(qmp) == error.replace("PATH", str(path))


@pytest.mark.parametrize("mode", ["on-success", "always"])
def test_its_bitmap_still_has_everything(daemon: Daemon, qmp: QmpClient, mode: str) -> None:
    path = daemon.directory / "target.img"
    start(qmp, "drive-backup", str(path), **{"bitmap": "b", "bitmap-mode": mode})
    replace(path)
    assert finish(qmp) is not None
    rows = qmp.execute("query-named-block-nodes")
    (bitmap,) = next(row["dirty-bitmaps"] for row in rows if row["node-name"] == "disk")
    assert bitmap["count"] == (0 if mode == "on-success" else len(DISK))


def test_a_target_that_was_only_moved_and_moved_back_is_good(
    daemon: Daemon, qmp: QmpClient
) -> None:
    path = daemon.directory / "target.img"
    start(qmp, "drive-backup", str(path))
    os.rename(path, path.with_name("elsewhere"))
    os.rename(path.with_name("elsewhere"), path)
    assert finish(qmp) is None
    assert path.read_bytes() == DISK


def test_a_link_to_nowhere_is_left_so_by_a_refused_command(daemon: Daemon, qmp: QmpClient) -> None:
    link, path = daemon.directory / "link.img", daemon.directory / "target.img"
    link.symlink_to(path)
    with pytest.raises(QmpError, match="Compression"):
        start(qmp, "drive-backup", str(link), compress=True)
    assert not path.exists()
    start(qmp, "drive-backup", str(link))
    assert finish(qmp) is None
    assert path.read_bytes() == DISK
    assert link.is_symlink()
