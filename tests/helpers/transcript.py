"""The transcripts in ``protocol/``: how they are read, played on a daemon, and compared.

``protocol/README.md`` says what their lines mean.
"""

from __future__ import annotations

import json
import re
import resource
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pytest

from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import NbdError
from tests.helpers.qmp_lines import Lines

MIB = 1 << 20
_LINE = re.compile(r"([A-Z]?)(->|<-) (.*)", re.DOTALL)
_FIRST = "A"


class Program(Protocol):
    """A daemon under test."""

    @property
    def pid(self) -> int: ...
    def connect(self) -> Lines:
        """A new client, which has received nothing yet."""

    def wait(self) -> int: ...


@dataclass(frozen=True)
class Line:
    """One line, with those that continue it; ``client`` is empty where it is no message."""

    text: str
    client: str = ""
    sent: bool = False
    body: str = ""

    @classmethod
    def of(cls, text: str) -> Line:
        match = _LINE.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(text, match[1] or _FIRST, match[2] == "->", re.sub(r"\n +", " ", match[3]))

    def with_message(self, message: Any) -> Line:
        """The same client receives another message."""
        arrow, _, _ = self.text.partition(" ")
        return Line.of(f"{arrow} {wrapped(json.dumps(message))}")


def read(path: Path) -> list[Line]:
    """The lines of a transcript; an indented one belongs to the one before it."""
    texts = re.split(r"\n(?! )", path.read_text(encoding="utf-8").removesuffix("\n"))
    return [Line.of(text) for text in texts]


def text_of(lines: list[Line]) -> str:
    """A transcript of these lines."""
    return "".join(f"{line.text}\n" for line in lines)


def wrapped(text: str) -> str:
    """A message over as many lines as it takes, cut between members; the further are indented."""
    glued = text.replace('": ', '":\N{NO-BREAK SPACE}')
    return textwrap.fill(
        glued, 97, subsequent_indent="     ", break_long_words=False, break_on_hyphens=False
    ).replace('":\N{NO-BREAK SPACE}', '": ')


def fits(expected: Any, actual: Any, directory: str) -> bool:
    """Whether a message is as told; ``$WORD`` in what is told stands for what varies."""
    match expected:
        case "$ANY":
            return True
        case "$TIME":
            return (
                isinstance(actual, dict)
                and actual.keys() == {"seconds", "microseconds"}
                and all(type(value) is int for value in actual.values())
            )
        case "$INT":
            return type(actual) is int
        case "$TEXT":
            return isinstance(actual, str)
        case str():
            return bool(actual == expected.replace("$DIR", directory))
        case dict():
            return isinstance(actual, dict) and _object_fits(expected, actual, directory)
        case list():
            return (
                isinstance(actual, list)
                and len(expected) == len(actual)
                and all(map(fits, expected, actual, [directory] * len(actual)))
            )
    return type(expected) is type(actual) and bool(expected == actual)


def _object_fits(expected: dict[str, Any], actual: dict[str, Any], directory: str) -> bool:
    told = expected.keys() - {"..."}
    complete = told == actual.keys() if told == expected.keys() else told < actual.keys()
    return complete and all(fits(expected[key], actual[key], directory) for key in told)


def with_placeholders(actual: Any, directory: str) -> Any:
    """A message as a transcript would tell it."""
    match actual:
        case {"seconds": int(), "microseconds": int()}:
            return "$TIME"
        case dict():
            return {key: with_placeholders(value, directory) for key, value in actual.items()}
        case list():
            return [with_placeholders(value, directory) for value in actual]
        case str():
            return actual.replace(directory, "$DIR")
    return actual


@dataclass
class Player:
    """Plays a transcript on a program, whose files are in ``directory``."""

    program: Program
    directory: Path
    clients: dict[str, Lines] = field(default_factory=dict)
    guests: dict[str, NbdClient] = field(default_factory=dict)

    def play(self, lines: list[Line]) -> list[Line]:
        """The lines as they came true: with the messages that came in the place of those told."""
        played = [self._play(line) for line in lines]
        return played + self._surplus()

    def _play(self, line: Line) -> Line:
        if not line.client:
            if line.text.startswith("-- "):
                self.happen(line.text[3:])
            else:
                assert not line.text or line.text.startswith("#"), line.text
            return line
        if line.sent:
            self.client(line.client).send(line.body.replace("$DIR", str(self.directory)))
            return line
        expected = json.loads(line.body)
        actual = self.receive(self.client(line.client), expected)
        if fits(expected, actual, str(self.directory)):
            return line
        return line.with_message(with_placeholders(actual, str(self.directory)))

    def receive(self, client: Lines, expected: dict[str, Any]) -> dict[str, Any]:
        """What comes where ``expected`` should."""
        return client.receive()

    def _surplus(self) -> list[Line]:
        """What came and was not told, up to the reply to a last question."""
        surplus: list[Line] = []
        for name, client in self.clients.items():
            if client.at_end:
                continue
            client.send('{"execute": "query-commands", "id": "the end"}')
            while (message := client.receive()).get("id") != "the end":
                told = with_placeholders(message, str(self.directory))
                surplus.append(Line.of(f"{name}<- ").with_message(told))
        return surplus

    def client(self, name: str) -> Lines:
        """The client of that name, which connects when it is first heard of."""
        if name not in self.clients:
            self.clients[name] = self.program.connect()
        return self.clients[name]

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        for guest in self.guests.values():
            guest.close()

    # -- what happens besides messages ---------------------------------------------------------

    def happen(self, sentence: str) -> None:
        """Make a ``--`` line come true, or find that it is."""
        for pattern, act in _HAPPENINGS.items():
            if match := re.fullmatch(pattern, sentence):
                act(self, *match.groups())
                return
        raise AssertionError(f"nobody knows how to do this: {sentence}")

    def _negotiate(self, name: str | None) -> None:
        client = self.client(name or _FIRST)
        assert "QMP" in client.receive()
        client.send('{"execute": "qmp_capabilities"}')
        assert client.receive() == {"return": {}}

    def _make_file(self, name: str, mib: str) -> None:
        (self.directory / name).write_bytes(Random(name).randbytes(int(mib) * MIB))

    def _copy_file(self, copy: str, original: str) -> None:
        (self.directory / copy).write_bytes((self.directory / original).read_bytes())

    def _compare_files(self, one: str, other: str) -> None:
        assert (self.directory / one).read_bytes() == (self.directory / other).read_bytes()

    def _find_no_file(self, name: str) -> None:
        assert not (self.directory / name).exists()

    def _open_export(self, name: str) -> None:
        self.guests[name] = NbdClient.open(str(self.directory / "nbd.sock"), name)

    def _write(self, length: str, offset: str, export: str) -> None:
        if export not in self.guests:
            self._open_export(export)
        self.guests[export].write(int(offset), b"w" * int(length))

    def _fail_to_write(self, length: str, offset: str, export: str, error: str) -> None:
        with pytest.raises(NbdError) as refused:
            self._write(length, offset, export)
        assert refused.value.code.name == error

    def _leave(self, export: str) -> None:
        self.guests.pop(export).disconnect()

    def _find_cut_off(self, export: str) -> None:
        guest = self.guests.pop(export)
        assert guest.at_end()
        guest.close()

    def _limit_files(self, mib: str) -> None:
        self._set_limit(int(mib) * MIB)

    def _lift_limit(self) -> None:
        self._set_limit(resource.RLIM_INFINITY)

    def _set_limit(self, size_bytes: int) -> None:
        limits = (size_bytes, resource.RLIM_INFINITY)
        resource.prlimit(self.program.pid, resource.RLIMIT_FSIZE, limits)

    def _wait_asleep(self, job: str) -> None:
        """A job with a very low speed has copied something, and sleeps."""
        with self.program.connect() as client:
            client.receive()
            client.send('{"execute": "qmp_capabilities"}')
            client.receive()
            progress = 0
            while not progress:
                client.send('{"execute": "query-jobs", "id": "progress"}')
                while (message := client.receive()).get("id") != "progress":
                    pass
                progress = {each["id"]: each for each in message["return"]}[job]["current-progress"]

    def _end(self) -> None:
        for client in self.clients.values():
            try:
                surplus = client.receive()
            except EOFError:
                continue
            raise AssertionError(f"after the end came {surplus}")
        assert self.program.wait() == 0


_HAPPENINGS: dict[str, Callable[..., None]] = {
    r"(?:([A-Z])|the client) connects and negotiates": Player._negotiate,
    r"(\S+) is a file of (\d+) MiB": Player._make_file,
    r"(\S+) is a copy of (\S+)": Player._copy_file,
    r"(\S+) is like (\S+)": Player._compare_files,
    r"there is no file (\S+)": Player._find_no_file,
    r"a guest connects to (\S+)": Player._open_export,
    r"a guest writes (\d+) bytes at (\d+) to (\S+)": Player._write,
    r"a guest can't write (\d+) bytes at (\d+) to (\S+): (\S+)": Player._fail_to_write,
    r"the guest of (\S+) leaves": Player._leave,
    r"the guest of (\S+) is cut off": Player._find_cut_off,
    r"from now on no file can be written beyond (\d+) MiB": Player._limit_files,
    r"from now on files can be written again": Player._lift_limit,
    r"the job (\S+) has copied something": Player._wait_asleep,
    r"the daemon ends": Player._end,
}
