"""TLS certificates made by OpenSSL, loaded by ``object-add``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates import Authority
from tests.helpers.daemon import Daemon
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient, QmpError


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    """A directory with an authority, and certificates of both ends; the server's key is sealed."""
    authority = Authority(tmp_path / "authority")
    authority.issue(tmp_path / "tls", "server", password="hunter2")
    return authority.issue(tmp_path / "tls", "client")


def refusal(qmp: QmpClient, directory: Path, **options: Any) -> str:
    with pytest.raises(QmpError) as refused:
        add(qmp, directory, **options)
    assert refused.value.error_class == "GenericError"
    return refused.value.description.replace(str(directory), "DIR")


def add(qmp: QmpClient, directory: Path, end: str = "server", **options: Any) -> None:
    common = {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(directory), "endpoint": end}
    qmp.execute("object-add", {**common, **options})
    qmp.execute("object-del", {"id": "tls"})


def test_certificates_are_loaded_or_refused(daemon: Daemon, credentials: Path) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        for name, data in (("right", "hunter2"), ("wrong", "swordfish")):
            qmp.execute("object-add", {"qom-type": "secret", "id": name, "data": data})
        qmp.execute("object-add", {"qom-type": "iothread", "id": "thread"})
        add(qmp, credentials, passwordid="right")
        add(qmp, credentials, "client")
        add(qmp, credentials, "client", **{"verify-peer": False})
        pair = "Cannot load certificate 'DIR/server-cert.pem' & key 'DIR/server-key.pem': "
        for password in ({}, {"passwordid": "wrong"}):
            assert refusal(qmp, credentials, **password).startswith(pair)
        assert refusal(qmp, credentials, passwordid="no") == "No secret with id 'no'"
        assert refusal(qmp, credentials, passwordid="thread") == (
            "Object with id 'thread' is not a secret"
        )
        damage(qmp, credentials)
    # Neither asked for at a terminal, nor told of.
    assert "PEM pass phrase" not in daemon.log()
    assert "hunter2" not in daemon.log()
    assert "swordfish" not in daemon.log()


def test_a_certificate_that_makes_others_is_the_ends_of_no_connection(
    daemon: Daemon, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority")
    for end in ("server", "client"):
        directory = authority.issue(tmp_path / end, end)
        for name in ("cert", "key"):
            shutil.copy(tmp_path / f"authority/ca-{name}.pem", directory / f"{end}-{name}.pem")
        told = (
            f"The certificate DIR/{end}-cert.pem basic constraints show a CA,"
            f" but we need one for a {end}"
        )
        peer = Peer(tmp_path)
        with QmpClient(daemon.qmp_path) as ours, QmpClient(peer.start()) as theirs:
            for qmp in (ours, theirs):
                assert refusal(qmp, directory, end=end) == told
        peer.kill()


def damage(qmp: QmpClient, credentials: Path) -> None:
    """What is missing or damaged is named."""
    (credentials / "client-key.pem").unlink()
    missing = "Unable to access credentials DIR/client-key.pem: No such file or directory"
    assert refusal(qmp, credentials, end="client") == missing
    # A client needs none of its own.
    (credentials / "client-cert.pem").unlink()
    add(qmp, credentials, "client")
    crl = credentials / "ca-crl.pem"
    crl.write_text("junk")
    assert refusal(qmp, credentials, end="client").startswith("Cannot load CRL 'DIR/ca-crl.pem': ")
    crl.unlink()
    # A key, but of another certificate.
    shutil.copy(credentials.parent / "authority/ca-key.pem", credentials / "server-key.pem")
    pair = "Cannot load certificate 'DIR/server-cert.pem' & key 'DIR/server-key.pem': "
    assert refusal(qmp, credentials).startswith(pair)
    (credentials / "ca-cert.pem").write_text("junk")
    assert refusal(qmp, credentials) == "Unable to import CA certificate list DIR/ca-cert.pem"
    (credentials / "ca-cert.pem").unlink()
    missing = "Unable to access credentials DIR/ca-cert.pem: No such file or directory"
    assert refusal(qmp, credentials) == missing
