"""A daemon over servers of other people that fail, or go away and come back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blockd.nbd.wire import Errno
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import NbdError
from tests.helpers.nbd_process import nbdkit, qemu_nbd, serving
from tests.helpers.qmp_client import QmpClient

SIZE = 4 << 20
CONTENT = random.Random(1).randbytes(SIZE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def add_nbd(qmp: QmpClient, name: str, path: Path, **more: Any) -> None:
    server = {"type": "unix", "path": str(path)}
    qmp.execute("blockdev-add", {"driver": "nbd", "node-name": name, "server": server, **more})


def add_file(qmp: QmpClient, name: str, path: Path) -> None:
    qmp.execute("blockdev-add", {"driver": "file", "node-name": name, "filename": str(path)})


def remove(qmp: QmpClient, name: str) -> None:
    """While its server is there: the daemon's end would wait for it."""
    qmp.execute("blockdev-del", {"node-name": name})


def start_backup(qmp: QmpClient, **more: Any) -> None:
    job = {"job-id": "job", "device": "source", "target": "target", "sync": "full"}
    qmp.execute("blockdev-backup", {**job, **more})


def end_of_job(qmp: QmpClient) -> dict[str, Any]:
    """How it ended, once it holds no node any more."""
    done: dict[str, Any] = qmp.wait_event("BLOCK_JOB_COMPLETED", device="job")["data"]
    qmp.wait_event("JOB_STATUS_CHANGE", status="null")
    return done


def test_a_guest_goes_on_and_its_next_flush_tells(
    daemon: Daemon, image: Path, tmp_path: Path
) -> None:
    rng = random.Random(2)
    model = bytearray(CONTENT)
    nbd_path = tmp_path / "nbd.sock"
    with serving(qemu_nbd(image), tmp_path / "s") as process, QmpClient(daemon.qmp_path) as qmp:
        add_nbd(qmp, "disk", process.socket_path, **{"reconnect-delay": 60})
        address = {"type": "unix", "data": {"path": str(nbd_path)}}
        qmp.execute("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
        qmp.execute("block-export-add", export)
        with NbdClient.open(str(nbd_path), "disk") as guest:
            for _ in range(3):
                for _ in range(20):
                    at, data = rng.randrange(SIZE - 4096), rng.randbytes(4096)
                    guest.write(at, data)
                    model[at : at + 4096] = data
                process.kill()
                process.start()
                with pytest.raises(NbdError) as raised:
                    guest.flush()
                assert raised.value.code == Errno.EIO
                guest.flush()
                assert guest.read(0, SIZE) == model
        qmp.execute("nbd-server-stop")
        remove(qmp, "disk")


@pytest.mark.parametrize("failing", ["source", "target"])
def test_a_job_stops_at_a_servers_error_and_goes_on(
    daemon: Daemon, image: Path, tmp_path: Path, failing: str
) -> None:
    """The server fails for as long as a file is there."""
    errors = tmp_path / "errors"
    errors.touch()
    remote, local = tmp_path / "remote.img", tmp_path / "local.img"
    for path, role in ((remote, failing), (local, "source" if failing == "target" else "target")):
        path.write_bytes(CONTENT if role == "source" else bytes(SIZE))
    command = nbdkit("--filter=error", "file", str(remote), "error=EIO")
    command += [f"error-file={errors}", "error-pread-rate=100%", "error-pwrite-rate=100%"]
    with serving(command, tmp_path / "s") as process, QmpClient(daemon.qmp_path) as qmp:
        add_nbd(qmp, failing, process.socket_path)
        add_file(qmp, "source" if failing == "target" else "target", local)
        start_backup(qmp, **{f"on-{failing}-error": "stop"})
        told = qmp.wait_event("BLOCK_JOB_ERROR", device="job")
        assert told["data"]["action"] == "stop"
        qmp.wait_event("JOB_STATUS_CHANGE", status="paused")
        errors.unlink()
        qmp.execute("job-resume", {"id": "job"})
        assert "error" not in end_of_job(qmp)
    assert remote.read_bytes() == local.read_bytes() == CONTENT


def test_a_backup_waits_for_its_source_to_come_back(
    daemon: Daemon, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "target.img").write_bytes(bytes(SIZE))
    with serving(qemu_nbd(image), tmp_path / "s") as process, QmpClient(daemon.qmp_path) as qmp:
        add_nbd(qmp, "source", process.socket_path, **{"reconnect-delay": 60})
        add_file(qmp, "target", tmp_path / "target.img")
        process.kill()
        start_backup(qmp)
        process.start()
        assert "error" not in end_of_job(qmp)
        remove(qmp, "source")
    assert (tmp_path / "target.img").read_bytes() == CONTENT


def test_a_backup_whose_target_was_away_fails(daemon: Daemon, image: Path, tmp_path: Path) -> None:
    """What it had written may be lost, and a backup that says it is whole has to be."""
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))
    with serving(qemu_nbd(target), tmp_path / "s") as process, QmpClient(daemon.qmp_path) as qmp:
        add_file(qmp, "source", image)
        add_nbd(qmp, "target", process.socket_path, **{"reconnect-delay": 60})
        start_backup(qmp, speed=65536)
        while not qmp.execute("query-jobs")[0]["current-progress"]:
            pass
        process.kill()
        process.start()
        qmp.execute("block-job-set-speed", {"device": "job", "speed": 0})
        assert end_of_job(qmp)["error"] == "Input/output error"
        remove(qmp, "target")
