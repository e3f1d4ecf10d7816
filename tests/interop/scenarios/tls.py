"""Who is let in: the objects that say so, and servers that are to ask them."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import Differs, Do, Scenario, do

ALLOW_A: dict[str, Any] = {"match": "a", "policy": "allow"}
WITHOUT_TLS = "'tls-authz' needs 'tls-creds' that verify the client's certificate"


def add(kind: str, **options: Any) -> Do:
    return do("object-add", qom_type=kind, id="o", **options)


def rules(*rules: Any) -> Do:
    return add("authz-list", rules=list(rules))


def start(**options: Any) -> Do:
    address = {"type": "unix", "data": {"path": "DIR/nbd.sock"}}
    return do("nbd-server-start", addr=address, **options)


def open_disk(**options: Any) -> Do:
    server = {"type": "unix", "path": "DIR/none"}
    return do("blockdev-add", driver="nbd", node_name="n", server=server, **options)


SCENARIOS = [
    Scenario(
        "authz-arguments",
        [
            add("authz-simple"),
            add("authz-simple", identity=3),
            add("authz-simple", identity=""),
            do("object-del", id="o"),
            add("authz-list", policy="wat"),
            add("authz-list", rules="wat"),
            rules(3),
            rules({}),
            rules({"match": "a"}),
            rules({**ALLOW_A, "format": "wat"}),
            rules({**ALLOW_A, "wat": 1}),
            rules(ALLOW_A, {**ALLOW_A, "policy": 3}),
            rules(),
            do("object-del", id="o"),
            rules(ALLOW_A, {**ALLOW_A, "format": "glob"}),
            add("authz-list"),
            add("authz-listfile"),
            add("authz-listfile", filename=3),
            add("authz-listfile", filename="DIR/none", refresh=3),
        ],
    ),
    Scenario(
        "tls-servers",
        [
            do("object-add", qom_type="secret", id="secret", data="x"),
            do("object-add", qom_type="authz-simple", id="authz", identity="x"),
            do("object-add", qom_type="tls-creds-anon", id="client"),
            start(tls_creds="none"),
            start(tls_creds=""),
            start(tls_creds=3),
            start(tls_creds="secret"),
            start(tls_creds="client"),
            start(tls_authz=3),
            Differs(
                start(tls_authz="authz"),
                why="the peer lets everybody in, without TLS",
                ours=[{"error": {"class": "GenericError", "desc": WITHOUT_TLS}}],
            ),
            Differs(
                do("nbd-server-stop"),
                why="the server does not run",
                ours=[{"error": {"class": "GenericError", "desc": "NBD server not running"}}],
            ),
            start(),
            start(tls_creds="none"),
        ],
    ),
    Scenario(
        "tls-clients",
        [
            do("object-add", qom_type="secret", id="secret", data="x"),
            do("object-add", qom_type="tls-creds-anon", id="server", endpoint="server"),
            open_disk(tls_creds="none"),
            open_disk(tls_creds=3),
            open_disk(tls_creds="secret"),
            open_disk(tls_creds="server"),
            open_disk(tls_hostname=3),
            open_disk(tls_hostname="localhost"),
        ],
    ),
]
