"""The NBD server, exports, and who uses them."""

from __future__ import annotations

from tests.helpers.scenario import (
    MIB,
    Bitmaps,
    Both,
    Connect,
    Content,
    CutOff,
    Differs,
    FileSizeLimit,
    Leave,
    Scenario,
    Told,
    Until,
    Write,
    do,
)
from tests.interop.scenarios.words import (
    bitmap,
    delete,
    export,
    node,
    server,
    unexport,
)

STOP = do("nbd-server-stop")
EXPORTS = do("query-block-exports")
LONG = "x" * 4097


def unix(path: str) -> dict[str, object]:
    return {"type": "unix", "data": {"path": path}}


def inet(host: str, port: object) -> dict[str, object]:
    return {"type": "inet", "data": {"host": host, "port": port}}


SCENARIOS = [
    Scenario("server-start-and-stop", [STOP, server(), server(), STOP, STOP, server(), STOP]),
    Scenario("server-tcp", [server(inet("127.0.0.1", "0")), STOP]),
    Scenario(
        "server-addresses-that-can-not-be",
        [
            server(unix("DIR/none/x")),
            server(unix("DIR/" + "a" * 200)),
            server(inet("127.0.0.1", "wat")),
            server(inet("1.2.3.4", "10809")),
            Content("none"),
        ],
    ),
    Scenario(
        "server-arguments",
        [
            do("nbd-server-start"),
            *[server(bad) for bad in (3, "x", {}, {"type": "wat"}, {"type": "unix"})],
            server({"type": "unix", "path": "x"}),
            server({"type": "unix", "data": {}}),
            server({"type": "unix", "data": {"path": 3}}),
            server({"type": "unix", "data": {"path": "x", "wat": 1}}),
            server({"type": "inet", "data": {"host": "x"}}),
            server(inet("127.0.0.1", 10809)),
            *[server(max_connections=bad) for bad in (-1, 1 << 32, "1", 1.5)],
            do("nbd-server-stop", x=1),
        ],
    ),
    Scenario(
        "export-and-remove",
        [
            node("n"),
            export("e"),
            server(),
            EXPORTS,
            export("e"),
            export("f", name="f", writable=True, description="disk f"),
            EXPORTS,
            unexport("e"),
            unexport("e"),
            unexport("f", mode="hard"),
            EXPORTS,
        ],
    ),
    Scenario(
        "export-refusals-in-order",
        [
            node("n"),
            node("t", read_only=True),
            export("1", "nope"),
            export("e", "nope"),
            export("e", "t", writable=True, name=LONG),
            export("e", name=LONG),
            server(),
            *[export(bad) for bad in ("", "1", "a b", "#a", "é")],
            export("e", name=LONG, description=LONG),
            export("e", description=LONG),
            export("e"),
            export("e", "nope"),
            export("f", "t", name="n", description=LONG),
            export("f", "t", name="n"),
            unexport("nope"),
        ],
    ),
    Scenario(
        "export-names",
        [
            node("n"),
            server(),
            export("e", name="x" * 4096),
            export("f", name=""),
            export("g", name="ü"),
            export("h" * 300, name="h"),
            EXPORTS,
        ],
    ),
    Scenario(
        "export-told-to-a-client",
        [
            node("n"),
            node("odd"),
            node("m", read_only=True),
            server(),
            Told("n"),
            export("e", writable=True),
            export("f", "odd", name="a name", description="ü"),
            export("g", "m", name=""),
            Told("n"),
            Told("a name"),
            Told(""),
            Told("nope"),
            Told("x" * 100),
            unexport("e"),
            Told("n"),
        ],
    ),
    Scenario(
        "export-told-when-one-client-at-most",
        [node("n"), server(max_connections=1), export("e"), Told("n")],
    ),
    Scenario(
        "export-arguments",
        [
            node("n"),
            server(),
            do("block-export-add", id="e", node_name="n"),
            do("block-export-add", type="nbd", node_name="n"),
            do("block-export-add", type="nbd", id="e"),
            do("block-export-add", type="wat", id="e", node_name="n"),
            export("e", writable=1),
            export("e", name=1),
            export("e", mountpoint="x"),
            do("block-export-del"),
            unexport("e", mode="wat"),
            unexport("e", mode=1),
        ],
    ),
    Scenario(
        "export-is-in-use-by-a-client",
        [
            node("n"),
            server(),
            export("e", writable=True),
            Write("n", 1, 3),
            unexport("e"),
            unexport("e", mode="safe"),
            EXPORTS,
            Leave("n"),
            EXPORTS,
            Content("n.img"),
        ],
    ),
    Scenario(
        "export-removed-under-a-client",
        [
            node("n"),
            server(),
            export("e", writable=True),
            Connect("n"),
            Both(unexport("e", mode="hard"), Until("BLOCK_EXPORT_DELETED")),
            CutOff("n"),
            EXPORTS,
            delete("n"),
        ],
    ),
    Scenario(
        "server-stops-under-clients",
        [
            node("n"),
            node("m"),
            server(),
            export("e", writable=True),
            export("f", "m"),
            export("g", "m", name="g"),
            Connect("n"),
            Connect("m"),
            STOP,
            CutOff("n"),
            CutOff("m"),
            EXPORTS,
            delete("n"),
            Content("nbd.sock"),
        ],
    ),
    Scenario(
        "quit-under-clients",
        [
            node("n"),
            server(),
            export("e", writable=True),
            export("f", name="f"),
            Write("n", 0, 512),
        ],
    ),
    Scenario(
        "export-read-only-refuses-a-write",
        [
            node("n"),
            server(),
            export("e"),
            Differs(
                Write("n", 0, 512),
                "the peer says EINVAL; the NBD specification asks for EPERM",
                [{"guest": "EPERM"}],
            ),
            Content("n.img"),
        ],
    ),
    Scenario(
        "export-error-of-the-disk",
        [
            node("t"),
            bitmap("b", "t"),
            server(),
            export("e", "t", writable=True),
            Write("t", 0, 512),
            FileSizeLimit(MIB),
            Write("t", 2 * MIB, 512),
            FileSizeLimit(),
            Bitmaps("t"),
            Write("t", 2 * MIB, 512),
            Content("t.img"),
        ],
    ),
]
