"""Backups from and to the exports of others, and of another blockd."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_process import nbdkit, qemu_nbd, serving
from tests.helpers.qmp_client import QmpClient

SIZE = 32 << 20
DATA_AT = 5 << 20
DATA = random.Random(1).randbytes(1 << 20)


def write_sparse(path: Path) -> None:
    """Data in one place, holes elsewhere."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(DATA_AT)
        file.write(DATA)


@contextmanager
def by_blockd(directory: Path, image: Path) -> Iterator[dict[str, Any]]:
    other = directory / "other"
    other.mkdir()
    daemon = Daemon(other)
    daemon.start()
    address = {"type": "unix", "data": {"path": str(other / "nbd.sock")}}
    export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
    with QmpClient(daemon.qmp_path) as qmp:
        add_file(qmp, "disk", image)
        qmp.execute("nbd-server-start", {"addr": address})
        qmp.execute("block-export-add", export)
    try:
        yield {"server": {"type": "unix", "path": str(other / "nbd.sock")}, "export": "disk"}
    finally:
        daemon.terminate()


@contextmanager
def by_command(directory: Path, command: list[str]) -> Iterator[dict[str, Any]]:
    with serving(command, directory / "s") as process:
        yield {"server": {"type": "unix", "path": str(process.socket_path)}}


Server: TypeAlias = Callable[[Path, Path], Any]
SERVERS: dict[str, Server] = {
    "blockd": by_blockd,
    "qemu-nbd": lambda directory, image: by_command(directory, qemu_nbd(image)),
    "nbdkit": lambda directory, image: by_command(directory, nbdkit("file", str(image))),
    "nbdkit-old": lambda directory, image: by_command(
        directory, nbdkit("--mask-handshake=0", "--no-sr", "file", str(image))
    ),
}


def add_file(qmp: QmpClient, name: str, path: Path) -> None:
    node = {"driver": "file", "node-name": name, "filename": str(path), "discard": "unmap"}
    qmp.execute("blockdev-add", node)


def back_up(qmp: QmpClient) -> None:
    job = {"job-id": "job", "device": "source", "target": "target", "sync": "full"}
    qmp.execute("blockdev-backup", job)
    done = qmp.wait_event("BLOCK_JOB_COMPLETED", device="job")
    assert "error" not in done["data"]
    qmp.wait_event("JOB_STATUS_CHANGE", status="null")


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_backup_is_the_disk(daemon: Daemon, tmp_path: Path, server: str, role: str) -> None:
    images = {"source": tmp_path / "source.img", "target": tmp_path / "target.img"}
    write_sparse(images["source"])
    # Not only zeroes, which a backup must make where the source has them.
    images["target"].write_bytes(b"old" * (SIZE // 3) + b"!!")
    with (
        SERVERS[server](tmp_path, images[role]) as options,
        QmpClient(daemon.qmp_path) as qmp,
    ):
        qmp.execute("blockdev-add", {"driver": "nbd", "node-name": role, **options})
        other = "target" if role == "source" else "source"
        add_file(qmp, other, images[other])
        back_up(qmp)
        qmp.execute("blockdev-del", {"node-name": role})
    assert images["target"].read_bytes() == images["source"].read_bytes()


def test_holes_are_not_read(daemon: Daemon, tmp_path: Path) -> None:
    """The server is asked for what it knows to be data, and for the rest of those clusters."""
    image, target, log = (tmp_path / name for name in ("source.img", "target.img", "log"))
    write_sparse(image)
    target.write_bytes(bytes(SIZE))
    command = nbdkit("--filter=log", "file", str(image), f"logfile={log}")
    with by_command(tmp_path, command) as options, QmpClient(daemon.qmp_path) as qmp:
        node = {"driver": "nbd", "node-name": "source", "read-only": True, **options}
        qmp.execute("blockdev-add", node)
        add_file(qmp, "target", target)
        back_up(qmp)
        qmp.execute("blockdev-del", {"node-name": "source"})
    told = log.read_text()
    read = [int(count, 16) for count in re.findall(r"\bRead id=.* count=0x([0-9a-f]+)", told)]
    assert sum(read) == len(DATA)
    assert target.read_bytes() == image.read_bytes()
