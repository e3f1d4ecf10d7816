"""What the audit tells of a command."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import Any, ClassVar

import pytest

from blockd import limits
from blockd.errors import BlockdError, DeviceNotActiveError
from blockd.qmp import audit
from blockd.qmp.access import Client, Credentials, Role
from blockd.qmp.dispatch import Command
from blockd.qmp.types import base

CLIENT = Client(7, Credentials(pid=4242, uid=1000, groups=frozenset([1000])), Role.FULL)


class Change(base.Command, kw_only=True):
    """A command for the tests."""

    command: ClassVar[str] = "x-change"


class Part(base.Object, kw_only=True):
    """The common part of two."""

    name: str


class Open(Part, tag_field="type", tag="open", kw_only=True):
    """No secret here."""

    text: str


class Sealed(Part, tag_field="type", tag="sealed", kw_only=True):
    """A secret in any form."""

    text_data: base.SecretText | None = None
    more: base.SecretText


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "blockd.qmp.audit")
    return caplog


def line(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    text = record.getMessage()
    assert text.isascii()
    assert text.isprintable()
    return text


def record(sent: dict[str, Any], error: BaseException | None = None) -> None:
    command = Command.of(Change, lambda _, __: None)
    with suppress(BaseException), audit.recorded(CLIENT, command, sent):
        if error is not None:
            raise error


def test_who_what_and_how_it_ended(lines: pytest.LogCaptureFixture) -> None:
    record({"id": "e", "n": [1, None]})
    assert line(lines) == (
        "audit: uid=1000 pid=4242 client=7 command=x-change "
        'arguments={"id":"e","n":[1,null]} result=ok'
    )


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (BlockdError("Bitmap 'b'\nis not found"), "GenericError \"Bitmap 'b'\\nis not found\""),
        (DeviceNotActiveError("No job é"), 'DeviceNotActive "No job \\u00e9"'),
        (FileNotFoundError(2, "x"), 'GenericError "No such file or directory"'),
        (
            ValueError("bug"),
            "GenericError \"Internal error: ValueError('bug'); see the daemon's log\"",
        ),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_failed_says_how(
    lines: pytest.LogCaptureFixture, error: BaseException, result: str
) -> None:
    record({}, error)
    assert line(lines).partition(" result=")[2] == result


@pytest.mark.parametrize(
    "text", ["a\nblockd: INFO: audit: uid=0", "\r\n", "\x1b[2J", "\u2028\u202e\x85", "\ud800"]
)
def test_nobody_writes_a_line_of_his_own(lines: pytest.LogCaptureFixture, text: str) -> None:
    record({"name": text, text: 1}, BlockdError(text))
    sent, _, result = line(lines).partition(" arguments=")[2].partition(" result=GenericError ")
    assert json.loads(sent) == {"name": text, text: 1}
    assert json.loads(result) == text


def test_no_line_is_too_long(lines: pytest.LogCaptureFixture) -> None:
    record({"name": "x" * 100_000}, BlockdError("é" * 100_000))
    text = line(lines)
    most = limits.AUDIT_ARGUMENTS_CHARACTERS + limits.AUDIT_ERROR_CHARACTERS
    assert most < len(text) < 2048
    cut = 100_000 + len('{"name":""}') - limits.AUDIT_ARGUMENTS_CHARACTERS
    assert f"...({cut} more) result=GenericError " in text


def test_secrets_are_not_shown() -> None:
    kinds = Open | Sealed
    sent = {"type": "sealed", "name": "n", "text-data": "hunter2", "more": 5}
    shown = {"type": "sealed", "name": "n", "text-data": "***", "more": "***"}
    assert audit.masked(kinds, sent) == shown
    # Misspelt, or in the wrong place.
    assert audit.masked(kinds, {"type": "open", "text": "t", "more": "hunter2"}) == {
        "type": "open",
        "text": "t",
        "more": "***",
    }
    assert audit.masked(kinds, {"Data": "hunter2", "hunter2": 1}) == {"***": "***"}
    assert audit.masked(Open, {"text": "t", "wrong": "w"}) == {"text": "t", "wrong": "w"}
