"""Backups to qcow2 files: what drive-backup makes, and what QEMU reads from it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qcow2 import check, qemu_img, qemu_io
from tests.helpers.qmp_client import QmpClient, QmpError

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB
DISK = random.Random(3).randbytes(MIB) + bytes(MIB) + b"t" * MIB + bytes(MIB)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[QmpClient]:
    """Of a daemon with a raw ``disk``, and an overlay ``top`` over a qcow2 image of the same."""
    directory = daemon.directory
    (directory / "disk").write_bytes(DISK)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", directory / "disk", directory / "base")
    qemu_img("create", "-f", "qcow2", "-b", directory / "base", "-F", "qcow2", directory / "top")
    qemu_io(directory / "top", "write -P 7 64k 64k", "write -z 2M 64k")
    with QmpClient(daemon.qmp_path) as client:
        for name, driver in (("disk", "raw"), ("top", "qcow2")):
            file = {"driver": "file", "filename": str(directory / name)}
            client.execute("blockdev-add", {"driver": driver, "node-name": name, "file": file})
        yield client


def start(client: QmpClient, target: Path, **more: Any) -> None:
    arguments = {"job-id": "j", "device": "disk", "target": str(target), "sync": "full"}
    arguments |= {"format": "qcow2"}
    arguments |= {name.replace("_", "-"): value for name, value in more.items()}
    client.execute("drive-backup", arguments)


def back_up(client: QmpClient, target: Path, **more: Any) -> None:
    start(client, target, **more)
    end = client.wait_event("BLOCK_JOB_COMPLETED")
    assert "error" not in end["data"]
    client.wait_event("JOB_STATUS_CHANGE", status="null")


def info(image: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(qemu_img("info", "-U", "--output=json", image))
    return told


def compare(first: Path, kind: str, second: Path) -> None:
    qemu_img("compare", "-U", "-f", kind, "-F", "qcow2", first, second)


@pytest.mark.parametrize("compress", [False, True])
def test_a_full_backup(daemon: Daemon, client: QmpClient, compress: bool) -> None:
    target = daemon.directory / "target"
    back_up(client, target, compress=compress)
    check(target)
    compare(daemon.directory / "disk", "raw", target)
    assert "backing-filename" not in info(target)
    compressed = json.loads(qemu_img("map", "--output=json", target))
    assert any(run["compressed"] for run in compressed) == compress
    assert not (daemon.directory / "target.blockd-incomplete").exists()


def test_over_what_was_there_before(daemon: Daemon, client: QmpClient) -> None:
    target = daemon.directory / "target"
    target.write_bytes(b"?" * (8 * MIB))
    back_up(client, target)
    check(target)
    compare(daemon.directory / "disk", "raw", target)


def test_a_refused_one_leaves_what_was_there(daemon: Daemon, client: QmpClient) -> None:
    target = daemon.directory / "target"
    for there in (False, True):
        if there:
            target.write_bytes(b"?" * MIB)
        with pytest.raises(QmpError, match="expects a non-negative value"):
            start(client, target, speed=-1)
        with pytest.raises(QmpError, match="max-workers must be between"):
            start(client, target, x_perf={"max-workers": 0})
        assert target.exists() == there
    assert target.read_bytes() == b"?" * MIB


def test_top_has_the_same_below(daemon: Daemon, client: QmpClient) -> None:
    target = daemon.directory / "target"
    back_up(client, target, device="top", sync="top")
    check(target)
    compare(daemon.directory / "top", "qcow2", target)
    told = info(target)
    assert told["backing-filename"] == str(daemon.directory / "base")
    assert told["backing-filename-format"] == "qcow2"
    held = [run for run in json.loads(qemu_img("map", "--output=json", target)) if not run["depth"]]
    assert sum(run["length"] for run in held) == 128 * KIB


def test_the_format_is_the_sources(daemon: Daemon, client: QmpClient) -> None:
    target = daemon.directory / "target"
    client.execute(
        "drive-backup",
        {"job-id": "j", "device": "top", "target": str(target), "sync": "full"},
    )
    client.wait_event("JOB_STATUS_CHANGE", status="null")
    check(target)
    compare(daemon.directory / "top", "qcow2", target)


def test_raw_has_nothing_below(daemon: Daemon, client: QmpClient) -> None:
    with pytest.raises(QmpError, match="Backing file not supported for file format 'raw'"):
        start(client, daemon.directory / "target", device="top", sync="top", format="raw")
    assert not (daemon.directory / "target").exists()


@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
@pytest.mark.parametrize("source", ["disk", "top"])
def test_none_keeps_what_guests_overwrite(
    daemon: Daemon, client: QmpClient, source: str, mode: str
) -> None:
    target = daemon.directory / "target"
    kind = "raw" if source == "disk" else "qcow2"
    before = daemon.directory / "before"
    qemu_img("convert", "-U", "-f", kind, "-O", "raw", daemon.directory / source, before)
    if mode == "existing":
        file = daemon.directory / source
        qemu_img("create", "-f", "qcow2", "-u", "-b", file, "-F", kind, target, str(SIZE))
    start(client, target, device=source, sync="none", mode=mode)
    path = str(daemon.directory / "nbd.sock")
    client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    client.execute(
        "block-export-add", {"type": "nbd", "id": "e", "node-name": source, "writable": True}
    )
    guest = NbdClient.open(path, source)
    for offset in (0, 64 * KIB, MIB, 3 * MIB - 512):
        guest.write(offset, b"g" * 1024)
    guest.close()
    client.execute("nbd-server-stop")
    client.execute("job-cancel", {"id": "j"})
    client.wait_event("JOB_STATUS_CHANGE", status="null")
    client.execute("blockdev-del", {"node-name": source})
    check(target)
    assert info(target)["backing-filename"] == str(daemon.directory / source)
    compare(before, "raw", target)


@pytest.mark.parametrize("target", ["raw", "existing raw"])
def test_raw_cannot_be_compressed(daemon: Daemon, client: QmpClient, target: str) -> None:
    path = daemon.directory / "target"
    path.write_bytes(bytes(SIZE))
    mode = "existing" if "existing" in target else "absolute-paths"
    with pytest.raises(QmpError, match=r"Compression is not supported for this drive $"):
        start(client, path, format="raw", mode=mode, compress=True)
