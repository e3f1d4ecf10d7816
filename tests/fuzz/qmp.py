"""QMP: commands made from the schema, right and wrong, and bytes that are none."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from contextlib import ExitStack
from random import Random
from typing import Any

from blockd.qmp.commands import schema
from blockd.qmp.introspection import Entity
from tests.helpers.daemon import Daemon
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient, QmpError

DISK_BYTES = 1 << 20
FILES = ["disk.img", "other.img", "target.img"]
NODES = ["n", "m", "t"]
BITMAPS = ["b", "c"]
JOBS = ["j", "k"]
OBJECTS = ["o", "p"]
#: What most strings are, so that commands meet what others have made. All paths are relative and
#: nothing ever has a slash: the daemon stays in its own directory.
NAMES = [*FILES, *NODES, *BITMAPS, *JOBS, *OBJECTS, "e", "raw", "", "#block001"]
#: What members of this name are, nearly always.
STRINGS = {
    "bitmap": BITMAPS,
    "bitmaps": BITMAPS,
    "data": ["hunter2", "eA=="],
    "device": [*NODES, *JOBS],
    "file": [*FILES, *NODES],
    "filename": FILES,
    "format": ["raw"],
    "host": ["127.0.0.1", "::1", ""],
    "id": [*JOBS, *OBJECTS, "e"],
    "job-id": JOBS,
    "name": [*BITMAPS, "e"],
    "node": NODES,
    "node-name": NODES,
    "path": ["nbd.sock"],
    "port": ["0"],
    "target": [*NODES, *FILES, *BITMAPS],
}
WEIRD = ["x" * 5000, "é", "\ud800", "\u0000", "\n", "\u202e", "a b", "-", "%s%n", "null", "🦀"]
#: Sizes and speeds that make sense.
PLAIN = [0, 1, 512, 4096, 65536, DISK_BYTES]
INTEGERS = [2, -1, 511, 513, DISK_BYTES + 1, 2**31, 2**32]
INTEGERS += [2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64]
JUNK = [b"\xff", b"\x00", b"\n", b"}", b"]", b"{", b"[", b'"', b"'", b"\\", b",", b":", b"\\u12"]
JUNK += [b"nul", b"-", b"1e999", b"[" * 300, b'{"a":' * 300, b"'x'", b"\xc3", b"\r\n", b"1" * 400]


def raw(node: str, file: str) -> dict[str, Any]:
    return {"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": file}}


#: What a round often begins with, so that there is something to do anything to.
SCENE: list[tuple[str, dict[str, Any]]] = [
    *[("blockdev-add", raw(node, file)) for node, file in zip(NODES, FILES, strict=True)],
    ("block-dirty-bitmap-add", {"node": "n", "name": "b"}),
    ("block-dirty-bitmap-add", {"node": "m", "name": "c", "granularity": 512}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True}),
    ("object-add", {"qom-type": "throttle-group", "id": "o"}),
    (
        "blockdev-backup",
        {
            "job-id": "j",
            "device": "n",
            "target": "t",
            "sync": "full",
            "speed": 65536,
            "auto-dismiss": False,
            "auto-finalize": False,
        },
    ),
]
#: How long the daemon is to wait for somebody else: not longer than we wait for it.
WAITS = {"open-timeout", "reconnect-delay"}
#: Not at random: they end the session's or the daemon's life.
NEVER = {"quit"}
REMEMBERED = 200


class Commands:
    """Makes commands; most of them are as the schema wants them, or nearly."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._types = {entity["name"]: entity for entity in schema()}
        calls = (each for each in schema() if each["meta-type"] == "command")
        self._commands = [each for each in calls if each["name"] not in NEVER]

    def scene(self) -> list[bytes]:
        """Good commands, some left out."""
        return [
            json.dumps({"execute": command, "arguments": arguments}).encode()
            for command, arguments in SCENE
            if self._random.random() < 0.8
        ]

    def message(self) -> bytes:
        """One text, or what should have been one."""
        command = self._random.choice(self._commands)
        arguments: Any = self._value(self._types[command["arg-type"]], 0, "")
        while self._random.random() < 0.2:
            arguments = self._damaged(arguments)
        arguments = without_long_waits(arguments)
        message: dict[str, Any] = {"execute": command["name"], "arguments": arguments}
        if self._random.random() < 0.2:
            message["id"] = self._anything(0)
        if self._random.random() < 0.05:
            message = self._damaged(message)
        text = json.dumps(message, ensure_ascii=self._random.random() < 0.9)
        data = text.encode("utf-8", "surrogatepass")
        return self._cut(data) if self._random.random() < 0.15 else data

    def _value(self, kind: Entity, depth: int, name: str) -> Any:
        """A value for the member ``name``."""
        match kind["meta-type"]:
            case "object":
                return self._object(kind, depth)
            case "array":
                element = self._types[kind["element-type"]]
                count = self._random.randrange(4)
                return [self._value(element, depth + 1, name) for _ in range(count)]
            case "enum":
                return self._random.choice(kind["values"])
            case "alternate":
                choices = [self._types[each["type"]] for each in kind["members"]]
                plain = [each for each in choices if each["meta-type"] != "object"]
                chosen = self._random.choice(choices if depth < 4 else plain)
                return self._value(chosen, depth + 1, name)
            case _:
                return self._plain(kind["json-type"], name)

    def _object(self, kind: Entity, depth: int) -> dict[str, Any]:
        members = list(kind["members"])
        made: dict[str, Any] = {}
        if "tag" in kind:
            variant = self._random.choice(kind["variants"])
            made[kind["tag"]] = variant["case"]
            members += self._types[variant["type"]]["members"]
        for member in members:
            name = member["name"]
            if name in made or ("default" in member and self._random.random() < 0.75):
                continue
            made[name] = self._value(self._types[member["type"]], depth + 1, name)
        return made

    def _plain(self, json_type: str, name: str = "") -> Any:
        match json_type:
            case "string":
                usual = STRINGS.get(name, NAMES)
                return self._random.choice(usual if self._random.random() < 0.95 else WEIRD)
            case "int":
                return self._random.choice(PLAIN if self._random.random() < 0.8 else INTEGERS)
            case "boolean":
                return self._random.random() < 0.5
            case "null":
                return None
            case _:
                return self._anything(0)

    def _anything(self, depth: int) -> Any:
        match self._random.randrange(8 if depth < 3 else 6):
            case 0:
                return self._random.choice([None, True, False])
            case 1:
                return self._random.choice([0.0, -1.5, 1e300])
            case 2 | 3:
                return self._plain("int")
            case 4 | 5:
                return self._random.choice([*NAMES, *WEIRD])
            case 6:
                return [self._anything(depth + 1) for _ in range(self._random.randrange(4))]
            case _:
                names = self._random.sample(NAMES, self._random.randrange(4))
                return {name: self._anything(depth + 1) for name in names}

    def _damaged(self, value: Any) -> Any:
        """The same with one thing, somewhere in it, changed, left out or added."""
        if not isinstance(value, dict) or not value:
            return self._anything(0)
        name = self._random.choice(list(value))
        rest = {each: held for each, held in value.items() if each != name}
        match self._random.randrange(4):
            case 0:
                return rest
            case 1:
                return {**value, self._random.choice([*NAMES, *WEIRD]): self._anything(0)}
            case 2:
                return {**rest, name: self._anything(0)}
            case _:
                return {**rest, name: self._damaged(value[name])}

    def _cut(self, data: bytes) -> bytes:
        """Bytes of ``data`` lost or doubled, and junk among them."""
        for _ in range(self._random.randrange(1, 4)):
            at, end = sorted(self._random.randrange(len(data) + 1) for _ in range(2))
            junk = self._random.choice(JUNK)
            data = self._random.choice(
                [data[:at] + data[end:], data[:end] + data[at:], data[:at] + junk + data[at:]]
            )[:20_000]
        return data


def without_long_waits(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: 1
        if name in WAITS and isinstance(held, int) and held > 1
        else without_long_waits(held)
        for name, held in value.items()
    }


class QmpTarget:
    """Each round is one client, which says some thirty things and then goes, or is cut off."""

    def __init__(self, daemon: Daemon, _: ExitStack) -> None:
        self._path = daemon.qmp_path
        self._sent: deque[bytes] = deque(maxlen=REMEMBERED)
        for name in FILES:
            (daemon.directory / name).write_bytes(bytes(DISK_BYTES))

    def last_input(self) -> str:
        return "\n".join(map(repr, self._sent))

    def play(self, random: Random) -> None:
        commands = Commands(random)
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(str(self._path))
            if random.random() < 0.95:
                self._send(client, b'{"execute": "qmp_capabilities"}')
            if random.random() < 0.5:
                for message in commands.scene():
                    self._send(client, message)
            for _ in range(random.randrange(4)):
                for _ in range(random.randrange(20)):
                    self._send(client, commands.message())
                if random.random() < 0.8:
                    self._back_in_step(client, lines)
            if random.random() < 0.5:
                client.shutdown(socket.SHUT_WR)
                for line in lines:
                    check(json.loads(line))

    def _send(self, client: socket.socket, data: bytes) -> None:
        self._sent.append(data)
        client.sendall(data)

    def _back_in_step(self, client: socket.socket, lines: Any) -> None:
        """A byte that JSON has no place for ends whatever is open; the next command works."""
        self._send(client, b'\xff{"execute": "query-jobs", "id": "back in step"}')
        while True:
            answer = json.loads(lines.readline())
            check(answer)
            if answer.get("id") == "back in step":
                return

    def settle(self, qmp: QmpClient) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while jobs := qmp.execute("query-jobs"):
            assert time.monotonic() < deadline, jobs
            for job in jobs:
                attempt(qmp, "job-dismiss", id=job["id"])
                attempt(qmp, "block-job-cancel", device=job["id"], force=True)
        attempt(qmp, "nbd-server-stop")
        for name in [*NAMES, *WEIRD]:
            attempt(qmp, "object-del", id=name)
        while nodes := qmp.execute("query-named-block-nodes"):
            names = [node["node-name"] for node in nodes]
            deleted = [attempt(qmp, "blockdev-del", node_name=name) for name in names]
            assert any(deleted), names
        qmp.events.clear()


def attempt(qmp: QmpClient, command: str, **arguments: Any) -> bool:
    sent = {name.replace("_", "-"): value for name, value in arguments.items()}
    try:
        qmp.execute(command, sent)
    except QmpError:
        return False
    return True


def check(message: Any) -> None:
    """Every line is a greeting, an answer or an event; none tells of a mistake in the daemon."""
    assert message.keys() & {"QMP", "return", "error", "event"}, message
    if "error" in message:
        assert message["error"].keys() == {"class", "desc"}
        assert "Internal error" not in message["error"]["desc"], message
