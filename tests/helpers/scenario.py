"""Short stories that a daemon plays: commands, what a guest does, events to wait for.

A step gives back what was seen during it, tidied: events and replies in their order, or what the
guest or a file told. Two daemons that behave alike give the same for every step.

In arguments and in what is seen, ``DIR`` is the daemon's directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Protocol

from blockd.nbd.wire import Info
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import NbdError
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tidy import Message, job_by_job, split_at_reply, tidy, without_noise

MIB = 1024 * 1024
DISK_BYTES = 3 * MIB


#: The files each scenario finds: its content is random where it is None.
FILES: dict[str, bytes | None] = {
    "n.img": None,
    "m.img": None,
    "t.img": bytes(DISK_BYTES),
    "u.img": bytes(DISK_BYTES),
    "small.img": bytes(MIB),
    "odd.img": bytes(MIB + 1),
}


class Program(Protocol):
    """A daemon under test: ours or the peer."""

    @property
    def pid(self) -> int: ...
    def start(self) -> socket.socket:
        """Start it; a connection to its monitor, which has sent nothing yet."""

    def wait(self) -> int: ...
    def kill(self) -> None: ...


class Stage:
    """One daemon with its files, a client of its monitor, and guests."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.program = program
        self.directory = directory
        self.guests: dict[str, NbdClient] = {}
        self.early: list[Message] = []
        self._unread = b""
        for name, data in FILES.items():
            (directory / name).write_bytes(random_disk(name) if data is None else data)

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """The daemon runs, and a client has negotiated with it."""
        self._monitor = self.program.start()
        try:
            with self._monitor:
                self._monitor.settimeout(PATIENCE_SECONDS)
                self.receive()
                self.send({"execute": "qmp_capabilities"})
                self.receive()
                yield
            for guest in self.guests.values():
                guest.close()
        except BaseException:
            self.program.kill()
            raise

    def send(self, message: Message) -> None:
        self._monitor.sendall(json.dumps(message).replace("DIR", str(self.directory)).encode())

    def next(self) -> Message:
        """The next event or reply. Raises EOFError when the daemon has closed."""
        return self.early.pop(0) if self.early else tidy(self.receive(), self.directory)

    def receive(self) -> Message:
        while b"\n" not in self._unread:
            piece = self._monitor.recv(65536)
            if not piece:
                raise EOFError(self._unread)
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        message: Message = json.loads(line)
        return message


@cache
def random_disk(seed: str) -> bytes:
    return Random(seed).randbytes(DISK_BYTES)


class Step(Protocol):
    def play(self, stage: Stage) -> list[Message]: ...


@dataclass(frozen=True)
class Do:
    """A command: the events up to its reply, and the reply."""

    command: str
    arguments: Message = field(default_factory=dict)

    def play(self, stage: Stage) -> list[Message]:
        stage.send({"execute": self.command, "arguments": self.arguments})
        events: list[Message] = []
        while "event" in (item := stage.next()):
            events.append(item)
        if "return" in item:
            events, stage.early = split_at_reply(self.command, self.arguments, events)
        return without_noise([*events, item])


@dataclass(frozen=True)
class Until:
    """All that is seen up to an event with this data."""

    event: str
    data: Message = field(default_factory=dict)

    def play(self, stage: Stage) -> list[Message]:
        items: list[Message] = []
        while True:
            item = stage.next()
            items.append(item)
            if self.ends_with(item):
                return without_noise(items)

    def ends_with(self, item: Message) -> bool:
        return item.get("event") == self.event and self.data.items() <= item["data"].items()


@dataclass(frozen=True)
class Both:
    """A command, and the event that its work ends with: the reply may come before or after it."""

    command: Do
    last: Until

    def play(self, stage: Stage) -> list[Message]:
        *events, reply = self.command.play(stage)
        if not any(self.last.ends_with(event) for event in events):
            events += self.last.play(stage)
        return [*events, reply]


@dataclass(frozen=True)
class EachJob:
    """A step whose events are told job by job: what happens to several is mixed by time."""

    step: Step

    def play(self, stage: Stage) -> list[Message]:
        return job_by_job(self.step.play(stage))


@dataclass(frozen=True)
class Asleep:
    """Waits until a slow job has copied something: it sleeps then, with nothing in flight."""

    job: str = "j"

    def play(self, stage: Stage) -> list[Message]:
        progress = 0
        while not progress:
            stage.send({"execute": "query-jobs"})
            while "event" in (item := stage.receive()):
                stage.early.append(tidy(item, stage.directory))
            progress = {job["id"]: job["current-progress"] for job in item["return"]}[self.job]
        return []


@dataclass(frozen=True)
class Write:
    """A guest, connected to ``export`` from its first write on, writes one byte again and again."""

    export: str
    offset: int
    length: int
    byte: bytes = b"w"

    def play(self, stage: Stage) -> list[Message]:
        guest = guest_of(stage, self.export)
        try:
            guest.write(self.offset, self.byte * self.length)
        except NbdError as error:
            return [{"guest": error.code.name}]
        return [{"guest": "ok"}]


@dataclass(frozen=True)
class Read:
    """A guest, connected to ``export`` from its first request on, reads; a digest of the bytes."""

    export: str
    offset: int
    length: int

    def play(self, stage: Stage) -> list[Message]:
        try:
            data = guest_of(stage, self.export).read(self.offset, self.length)
        except NbdError as error:
            return [{"read": error.code.name}]
        return [{"read": hashlib.sha256(data).hexdigest()}]


@dataclass(frozen=True)
class Reads:
    """A guest, connected to ``export`` from its first request on, reads the disk: a digest."""

    export: str

    def play(self, stage: Stage) -> list[Message]:
        guest = guest_of(stage, self.export)
        digest = hashlib.sha256()
        for offset in range(0, DISK_BYTES, MIB):
            digest.update(guest.read(offset, MIB))
        return [{"guest": digest.hexdigest()}]


@dataclass(frozen=True)
class Connect:
    """A guest connects, and stays; what it was told."""

    export: str

    def play(self, stage: Stage) -> list[Message]:
        try:
            guest_of(stage, self.export)
        except NbdError as error:
            return [{"guest": error.code.name}]
        return [{"guest": "connected"}]


def guest_of(stage: Stage, export: str) -> NbdClient:
    if export not in stage.guests:
        address = str(stage.directory / "nbd.sock")
        stage.guests[export] = NbdClient.open(address, export)
    return stage.guests[export]


@dataclass(frozen=True)
class Told:
    """What a client that does not stay is told: the list of exports, and all about one of them."""

    export: str

    def play(self, stage: Stage) -> list[Message]:
        with NbdClient.connect(str(stage.directory / "nbd.sock")) as client:
            listed = client.list_exports()
            try:
                contexts = client.list_contexts(self.export)
                info = client.info(self.export, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
            except NbdError as error:
                return [{"list": listed, "error": str(error)}]
        return [{"list": listed, "contexts": contexts, "info": info._asdict()}]


@dataclass(frozen=True)
class Leave:
    """The guest says goodbye."""

    export: str

    def play(self, stage: Stage) -> list[Message]:
        stage.guests.pop(self.export).disconnect()
        return []


@dataclass(frozen=True)
class CutOff:
    """Waits until the server has closed the guest's connection."""

    export: str

    def play(self, stage: Stage) -> list[Message]:
        guest = stage.guests.pop(self.export)
        at_end = guest.at_end()
        guest.close()
        return [{"closed": at_end}]


@dataclass(frozen=True)
class Content:
    """What is in a file: a digest of its bytes, or that there is none."""

    name: str

    def play(self, stage: Stage) -> list[Message]:
        path = stage.directory / self.name
        if not path.is_file():
            return [{"file": "regular" if path.exists() else "none"}]
        return [{"file": hashlib.sha256(path.read_bytes()).hexdigest()}]


@dataclass(frozen=True)
class FileSizeLimit:
    """From now on the kernel refuses the daemon's writes at this offset and beyond (EFBIG)."""

    size_bytes: int = resource.RLIM_INFINITY

    def play(self, stage: Stage) -> list[Message]:
        limits = (self.size_bytes, resource.RLIM_INFINITY)
        resource.prlimit(stage.program.pid, resource.RLIMIT_FSIZE, limits)
        return []


@dataclass(frozen=True)
class Bitmaps:
    """The dirty bitmaps of one node, as query-named-block-nodes lists them."""

    node: str

    def play(self, stage: Stage) -> list[Message]:
        *events, reply = Do("query-named-block-nodes").play(stage)
        nodes = {node["node-name"]: node for node in reply["return"]}
        return [*events, {"bitmaps": nodes[self.node].get("dirty-bitmaps")}]


@dataclass(frozen=True)
class Differs:
    """A step in which ours is meant to differ from the peer's: how, and why."""

    step: Step
    why: str
    ours: list[Message]

    def play(self, stage: Stage) -> list[Message]:
        return self.step.play(stage)


@dataclass(frozen=True)
class End:
    """All up to the end of the connection, then the exit status."""

    def play(self, stage: Stage) -> list[Message]:
        items: list[Message] = []
        with contextlib.suppress(EOFError):
            while True:
                items.append(stage.next())
        return [*without_noise(items), {"exit": stage.program.wait()}]


@dataclass(frozen=True)
class Terminate:
    """SIGTERM."""

    def play(self, stage: Stage) -> list[Message]:
        os.kill(stage.program.pid, signal.SIGTERM)
        return []


@dataclass(frozen=True)
class Scenario:
    """A story. What it leaves is looked at by ``queries``, and then ended as ``ending`` says."""

    name: str
    steps: Sequence[Step]
    ending: Step = field(default_factory=lambda: Do("quit"))
    queries: Sequence[str] = ("query-jobs", "query-block-exports", "query-named-block-nodes")

    def all_steps(self) -> list[Step]:
        return [*self.steps, *map(Do, self.queries), self.ending, End()]

    def play(self, program: Program, directory: Path) -> list[list[Message]]:
        stage = Stage(program, directory)
        with stage.up():
            return [step.play(stage) for step in self.all_steps()]


def do(command: str, **arguments: Any) -> Do:
    """A command; ``node_name`` stands for the argument ``node-name``."""
    return Do(command, {name.replace("_", "-"): value for name, value in arguments.items()})
