"""More clients than usual, and more than the daemon has descriptors for."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import PATIENCE_SECONDS, QmpClient


def test_out_of_descriptors_new_clients_wait_and_all_others_go_on(
    daemon: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    nbd_path = str(tmp_path / "nbd.sock")
    with QmpClient(daemon.qmp_path) as qmp:
        file = {"driver": "file", "filename": str(tmp_path / "disk.img")}
        qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
        address = {"type": "unix", "data": {"path": nbd_path}}
        qmp.execute("nbd-server-start", {"addr": address})
        qmp.execute("block-export-add", {"type": "nbd", "id": "disk", "node-name": "disk"})
        guest = NbdClient.open(nbd_path, "disk")
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        used = 1 + max(int(fd) for fd in os.listdir(f"/proc/{daemon.pid}/fd"))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        waiting = [connect(path) for path in (nbd_path, str(daemon.qmp_path)) for _ in range(9)]
        for _ in range(100):
            assert qmp.execute("query-jobs") == []
            assert guest.read(0, 4) == bytes(4)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        for client in waiting:
            assert client.recv(7) in (b"NBDMAGI", b'{"QMP":')
            client.close()
        guest.close()
    assert daemon.log().count("can't be accepted") <= 2


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_SECONDS)
    client.connect(path)
    return client
