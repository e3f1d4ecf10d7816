"""Who is let in by the name in a certificate; the names are those that the peer makes of them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers.certificates import Authority
from tests.helpers.daemon import Daemon
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool

SUBJECTS = [
    "/O=Test/CN=fred",
    '/C=GB/ST=London/L=Lon, don/O=A "q" \\+ B;<x>/OU=x\\\\y=z/CN= both ends ',
    "/CN=#hash/emailAddress=a@b/UID=u/DC=example/serialNumber=12/businessCategory=Biz",
    "/CN=Ünï",
    "/O=Test/OU=a+OU=b/CN=x",
    "/GN=Gi/SN=Su/title=Dr/street=road/initials=I/name=n/pseudonym=p/postalCode=1",
    "/dnQualifier=d/generationQualifier=3",
]
DENIED = re.compile(r"TLS x509 authz check for (.*) is denied")


def commands(directory: Path, tls: Path) -> list[tuple[str, dict[str, Any]]]:
    """A server that lets nobody in."""
    return [
        (
            "object-add",
            {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(tls), "endpoint": "server"},
        ),
        ("object-add", {"qom-type": "authz-list", "id": "who"}),
        (
            "nbd-server-start",
            {
                "addr": {"type": "unix", "data": {"path": str(directory / "nbd.sock")}},
                "tls-creds": "tls",
                "tls-authz": "who",
            },
        ),
    ]


def lists(directory: Path, credentials: Path) -> bool:
    """Whether a client that has these can see the server's exports."""
    uri = (
        f"nbds+unix:///?socket={directory / 'nbd.sock'}&tls-certificates={credentials}"
        "&tls-verify-peer=true&tls-hostname=localhost"
    )
    done = subprocess.run(
        [require_tool("nbdinfo"), "--list", uri],
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    return done.returncode == 0


def test_names_are_written_as_the_peer_does(daemon: Daemon, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    tls = authority.issue(tmp_path / "server", "server")
    clients = [
        authority.issue(tmp_path / f"client{number}", "client", subject=subject)
        for number, subject in enumerate(SUBJECTS)
    ]
    theirs = tmp_path / "peer"
    theirs.mkdir()
    peer = Peer(theirs)
    with QmpClient(daemon.qmp_path) as qmp, peer.start() as monitor:
        for command, arguments in commands(tmp_path, tls):
            qmp.execute(command, arguments)
        converse(monitor, [("qmp_capabilities", {}), *commands(theirs, tls)])
        for client in clients:
            assert not lists(tmp_path, client)
            assert not lists(theirs, client)
        converse(monitor, [("quit", {})])
        peer.wait()
    names = DENIED.findall(daemon.log())
    assert names == DENIED.findall((theirs / "peer.log").read_text())
    assert len(names) == len(SUBJECTS)


def converse(monitor: socket.socket, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Each command is carried out."""
    with monitor.makefile("rw") as lines:
        for command, arguments in calls:
            lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            lines.flush()
            reply: dict[str, Any] = {}
            while "return" not in reply:
                reply = json.loads(lines.readline())
                assert "error" not in reply, reply


def test_a_list_can_be_changed_while_the_server_runs(daemon: Daemon, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    tls = authority.issue(tmp_path / "server", "server")
    fred, mary = (
        authority.issue(tmp_path / name, "client", subject=f"/O=Test/CN={name}")
        for name in ("fred", "mary")
    )
    with QmpClient(daemon.qmp_path) as qmp:
        for command, arguments in commands(tmp_path, tls):
            qmp.execute(command, arguments)
        qmp.execute("object-del", {"id": "who"})
        assert not lists(tmp_path, fred)
        assert "authz check for O=Test,CN=fred: no authz object 'who'" in daemon.log()
        rules = [{"match": "*,CN=fred", "policy": "allow", "format": "glob"}]
        qmp.execute("object-add", {"qom-type": "authz-list", "id": "who", "rules": rules})
        assert lists(tmp_path, fred)
        assert not lists(tmp_path, mary)
