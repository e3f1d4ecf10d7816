"""The audit: one line in the log for each command that may change something, done or not.

    audit: uid=0 pid=812 client=3 command=block-export-del arguments={"id":"e"} result=ok

What a client sent is JSON in ASCII here, so that it can neither begin a new line nor look like
another one, and no line is longer than the limits say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from msgspec import inspect

from blockd import limits
from blockd.qmp.access import Client
from blockd.qmp.dispatch import Command, classify

_log = logging.getLogger(__name__)

_MASK = "***"


@contextmanager
def recorded(client: Client, command: Command, sent: dict[str, Any]) -> Iterator[None]:
    """Tell how the command ended that the block carries out for ``client``."""
    result = "interrupted"
    try:
        yield
        result = "ok"
    except Exception as error:
        failure = classify(error)
        message = _cut(_json(failure.message), limits.AUDIT_ERROR_CHARACTERS)
        result = f"{failure.error_class} {message}"
        raise
    finally:
        _log.info(
            "audit: uid=%d pid=%d client=%d command=%s arguments=%s result=%s",
            client.credentials.uid,
            client.credentials.pid,
            client.number,
            command.name,
            _cut(_json(masked(command.declaration, sent)), limits.AUDIT_ARGUMENTS_CHARACTERS),
            result,
        )


def masked(declaration: Any, sent: dict[str, Any]) -> dict[str, Any]:
    """The arguments without secrets.

    Of a command that takes secrets, only members that are declared and none are shown: a secret
    may be sent with its member's name misspelt.
    """
    open_members, secrets = _members(declaration)
    if not secrets:
        return sent
    return {
        name if name in open_members | secrets else _MASK: value if name in open_members else _MASK
        for name, value in sent.items()
    }


@cache
def _members(declaration: Any) -> tuple[set[str], set[str]]:
    """The names of the members that may be shown, and of those that may not."""
    kind = inspect.type_info(declaration)
    structs = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    open_members, secrets = set[str](), set[str]()
    for struct in structs:
        assert isinstance(struct, inspect.StructType)
        if struct.tag_field is not None:
            open_members.add(struct.tag_field)
        for field in struct.fields:
            (secrets if _is_secret(field.type) else open_members).add(field.encode_name)
    return open_members, secrets


def _is_secret(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return any(map(_is_secret, kind.types))
    return isinstance(kind, inspect.Metadata) and bool((kind.extra or {}).get("secret"))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}...({len(text) - most} more)"
