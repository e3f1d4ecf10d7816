"""An NBD server at a socket that systemd has opened, as it passes sockets."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient

#: What systemd does between its fork and its exec.
SCRIPT = 'exec 3<&{fd}; LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=disks exec "$@"'


def test_clients_wait_at_the_socket_while_no_server_runs(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        script = SCRIPT.format(fd=listening.fileno())
        program = ["/bin/bash", "-c", script, "bash", sys.executable, "-m", "blockd"]
        daemon = Daemon(tmp_path, program, pass_fds=[listening.fileno()])
        daemon.start()
    try:
        with QmpClient(daemon.qmp_path) as qmp:
            qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "disk", "size": 4096})
            for name in ("disks", "3"):
                early = socket.socket(socket.AF_UNIX)
                early.connect(path)
                address = {"type": "fd", "data": {"str": name}}
                qmp.execute("nbd-server-start", {"addr": address})
                export = {"type": "nbd", "id": "disk", "node-name": "disk"}
                qmp.execute("block-export-add", export)
                with NbdClient(early) as client:
                    assert client.go("disk").size_bytes == 4096
                qmp.execute("nbd-server-stop")
    finally:
        assert daemon.terminate() == 0
    assert Path(path).exists()
