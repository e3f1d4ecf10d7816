"""TLS with the clients of others, and who is not let in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.certificates import Authority
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool

MIB = 1024 * 1024


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require_tool(command[0]), *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


class TlsServer:
    """A daemon with a random disk behind TLS, and what its clients need."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory / "authority")
        self.socket_path = directory / "nbd.sock"
        self.image = directory / "disk.img"
        self.image.write_bytes(os.urandom(4 * MIB))
        self.tls = self.authority.issue(directory / "server", "server")
        self.good = self.authority.issue(directory / "client", "client")
        self.qmp = QmpClient(daemon.qmp_path)
        disk = {"driver": "file", "node-name": "disk", "filename": str(self.image)}
        self.qmp.execute("blockdev-add", disk)

    def add(self, kind: str, name: str, **options: object) -> None:
        self.qmp.execute("object-add", {"qom-type": kind, "id": name, **options})

    def start(self, **options: object) -> None:
        self.add("tls-creds-x509", "tls", endpoint="server", dir=str(self.tls), **options)
        self.serve()

    def serve(self, **options: object) -> None:
        address = {"type": "unix", "data": {"path": str(self.socket_path)}}
        settings = {name.replace("_", "-"): value for name, value in options.items()}
        self.qmp.execute("nbd-server-start", {"addr": address, "tls-creds": "tls", **settings})
        self.qmp.execute(
            "block-export-add",
            {"type": "nbd", "id": "disk", "node-name": "disk", "writable": True},
        )

    def uri(self, credentials: Path) -> str:
        """What libnbd understands."""
        return (
            f"nbds+unix:///disk?socket={self.socket_path}&tls-certificates={credentials}"
            "&tls-verify-peer=true&tls-hostname=localhost"
        )

    def nbdinfo(self, credentials: Path) -> subprocess.CompletedProcess[str]:
        return run("nbdinfo", "--json", self.uri(credentials))


@pytest.fixture
def server(daemon: Daemon, tmp_path: Path) -> Iterator[TlsServer]:
    server = TlsServer(daemon, tmp_path)
    yield server
    server.qmp.close()


def test_libnbd_reads_and_writes(server: TlsServer) -> None:
    server.start()
    told = server.nbdinfo(server.good)
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    assert (answer["TLS"], answer["exports"][0]["export-size"]) == (True, 4 * MIB)
    uri, copy = server.uri(server.good), server.directory / "copy.img"
    assert run("nbdcopy", uri, str(copy)).returncode == 0
    assert copy.read_bytes() == server.image.read_bytes()
    copy.write_bytes(os.urandom(4 * MIB))
    assert run("nbdcopy", "--flush", str(copy), uri).returncode == 0
    assert copy.read_bytes() == server.image.read_bytes()


def test_qemu_reads(server: TlsServer) -> None:
    server.start()
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={server.good}"
    disk = (
        f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={server.socket_path},"
        "file.export=disk,file.tls-creds=tls,file.tls-hostname=localhost"
    )
    file = f"driver=raw,file.filename={server.image}"
    compared = run("qemu-img", "compare", "--object", credentials, "--image-opts", disk, file)
    assert compared.returncode == 0, compared.stderr


def test_a_plain_client_is_told_that_it_needs_tls(server: TlsServer) -> None:
    server.start()
    refused = run("qemu-img", "info", f"nbd+unix:///disk?socket={server.socket_path}")
    assert refused.returncode
    assert "TLS negotiation required before option 7 (go)" in refused.stderr


def test_a_client_whose_certificate_is_no_good_is_not_let_in(server: TlsServer) -> None:
    stranger = Authority(server.directory / "stranger")
    credentials = {
        "none": server.authority.trusted_in(server.directory / "none"),
        "old": server.authority.issue(server.directory / "old", "client", days=-1),
        "unknown": stranger.issue(server.directory / "unknown", "client"),
    }
    # It believes the server all the same.
    server.authority.trusted_in(credentials["unknown"])
    server.start()
    for why, directory in credentials.items():
        assert server.nbdinfo(directory).returncode, why
    assert server.nbdinfo(server.good).returncode == 0


def test_a_client_without_a_certificate_is_let_in_where_none_is_asked_for(
    server: TlsServer,
) -> None:
    server.start(**{"verify-peer": False})
    told = server.nbdinfo(server.authority.trusted_in(server.directory / "none"))
    assert told.returncode == 0, told.stderr


def test_certificates_are_renewed_while_clients_are_connected(server: TlsServer) -> None:
    """The other authority's clients get in from then on; without credentials the last ones stay."""
    server.start()
    other = Authority(server.directory / "other")
    other_client = other.issue(server.directory / "others", "client")
    with NbdClient.open_tls(str(server.socket_path), "disk", server.good) as guest:
        assert server.nbdinfo(other_client).returncode
        server.qmp.execute("object-del", {"id": "tls"})
        assert server.nbdinfo(server.good).returncode == 0
        other.issue(server.tls, "server")
        server.add("tls-creds-x509", "tls", endpoint="server", dir=str(server.tls))
        assert server.nbdinfo(server.good).returncode
        assert server.nbdinfo(other_client).returncode == 0
        assert guest.read(0, MIB) == server.image.read_bytes()[:MIB]
