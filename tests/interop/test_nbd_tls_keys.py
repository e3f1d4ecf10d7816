"""TLS without certificates: keys that both ends have, or nothing at all."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates import Authority
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_process import qemu_nbd, serving
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient, QmpError
from tests.helpers.tools import require_tool

CAN_USE_KEYS = bool(getattr(ssl, "HAS_PSK", False))
TOO_OLD = "TLS credentials 'tls' are keys, for which blockd needs Python 3.13 or newer"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    made.mkdir()
    (made / "keys.psk").write_text(f"qemu:{'5a' * 32}\nother:{'a5' * 32}\n")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong/keys.psk").write_text(f"qemu:{'5b' * 32}\nnobody:{'5a' * 32}\n")
    return made


def serve(qmp: QmpClient, directory: Path, **credentials: str) -> None:
    """An empty disk, behind these credentials."""
    named = {name.replace("_", "-"): value for name, value in credentials.items()}
    qmp.execute("object-add", {"id": "tls", "endpoint": "server", **named})
    address = {"type": "unix", "data": {"path": str(directory / "nbd.sock")}}
    qmp.execute("nbd-server-start", {"addr": address, "tls-creds": "tls"})
    qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "disk", "size": 1 << 20})
    qmp.execute("block-export-add", {"type": "nbd", "id": "disk", "node-name": "disk"})


def qemu_gets_in(directory: Path, credentials: str) -> bool:
    disk = (
        f"driver=nbd,server.type=unix,server.path={directory / 'nbd.sock'},"
        "export=disk,tls-creds=tls"
    )
    tls = f"{credentials},id=tls,endpoint=client"
    done = subprocess.run(
        [require_tool("qemu-img"), "info", "--object", tls, "--image-opts", disk],
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    return done.returncode == 0


def open_disk(qmp: QmpClient, socket_path: Path, **credentials: Any) -> None:
    """Become a client, for a moment."""
    qmp.execute("object-add", {"id": "tls", "endpoint": "client", **credentials})
    try:
        server = {"type": "unix", "path": str(socket_path)}
        disk = {"driver": "nbd", "node-name": "nbd", "server": server, "tls-creds": "tls"}
        qmp.execute("blockdev-add", disk)
        qmp.execute("blockdev-del", {"node-name": "nbd"})
    finally:
        qmp.execute("object-del", {"id": "tls"})


def test_without_credentials(daemon: Daemon, tmp_path: Path) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        serve(qmp, tmp_path, qom_type="tls-creds-anon")
        assert qemu_gets_in(tmp_path, "tls-creds-anon")
        assert not qemu_gets_in(tmp_path, "tls-creds-x509,verify-peer=off,dir=/nowhere")


def test_a_server_without_credentials(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    options = ["--object", "tls-creds-anon,id=tls,endpoint=server", "--tls-creds", "tls"]
    with serving(qemu_nbd(image, *options), tmp_path / "s"), QmpClient(daemon.qmp_path) as qmp:
        open_disk(qmp, tmp_path / "s", **{"qom-type": "tls-creds-anon"})


def test_whoever_has_a_key_gets_in(daemon: Daemon, tmp_path: Path, keys: Path) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        if not CAN_USE_KEYS:
            with pytest.raises(QmpError) as refused:
                serve(qmp, tmp_path, qom_type="tls-creds-psk", dir=str(keys))
            assert refused.value.description == TOO_OLD
            return
        serve(qmp, tmp_path, qom_type="tls-creds-psk", dir=str(keys))
        for user in ("qemu", "other"):
            assert qemu_gets_in(tmp_path, f"tls-creds-psk,dir={keys},username={user}")
        for user in ("qemu", "nobody"):
            wrong = f"tls-creds-psk,dir={tmp_path / 'wrong'},username={user}"
            assert not qemu_gets_in(tmp_path, wrong)


def test_a_server_that_wants_a_key(daemon: Daemon, tmp_path: Path, keys: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    psk = {"qom-type": "tls-creds-psk", "dir": str(keys)}
    options = [f"tls-creds-psk,id=tls,endpoint=server,dir={keys}", "--tls-creds", "tls"]
    command = qemu_nbd(image, "--object", *options)
    with serving(command, tmp_path / "s"), QmpClient(daemon.qmp_path) as qmp:
        if not CAN_USE_KEYS:
            with pytest.raises(QmpError) as refused:
                open_disk(qmp, tmp_path / "s", **psk)
            assert refused.value.description == TOO_OLD
            return
        open_disk(qmp, tmp_path / "s", **psk)
        with pytest.raises(QmpError) as refused:
            open_disk(qmp, tmp_path / "s", **{**psk, "dir": str(tmp_path / "wrong")})
        assert "TLS" in refused.value.description or "read" in refused.value.description


def test_a_server_without_the_key_shows_a_certificate(
    daemon: Daemon, tmp_path: Path, keys: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    shown = Authority(tmp_path / "authority").issue(tmp_path / "shown", "server")
    options = [f"tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir={shown}"]
    command = qemu_nbd(image, "--object", *options, "--tls-creds", "tls")
    with serving(command, tmp_path / "s"), QmpClient(daemon.qmp_path) as qmp:
        with pytest.raises(QmpError) as refused:
            open_disk(qmp, tmp_path / "s", **{"qom-type": "tls-creds-psk", "dir": str(keys)})
        told = refused.value.description
        assert (told == TOO_OLD) if not CAN_USE_KEYS else ("ertificate" in told)
