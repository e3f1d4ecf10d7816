"""QMP's bytes on the way out: replies and events, one line each, ended by CR LF."""

from __future__ import annotations

from typing import Any

import orjson

from blockd.events import Event


def encode(message: object) -> bytes:
    """One line. As in QEMU, U+FFFD stands for what is not UTF-8 in a name."""
    try:
        return orjson.dumps(message) + b"\r\n"
    except orjson.JSONEncodeError:
        return orjson.dumps(_readable(message)) + b"\r\n"


def _readable(value: object) -> object:
    match value:
        case str():
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        case dict():
            return {_readable(key): _readable(each) for key, each in value.items()}
        case list() | tuple():
            return [_readable(each) for each in value]
        case _:
            return value


def success(result: object, request_id: dict[str, Any]) -> bytes:
    """The reply to a command that was carried out; ``request_id`` is {} or has its ``id``."""
    return encode({"return": {} if result is None else result, **request_id})


def failure(error_class: str, message: str, request_id: dict[str, Any]) -> bytes:
    """The reply to a command that was refused or failed, or to what was none."""
    return encode({**request_id, "error": {"class": error_class, "desc": message}})


def event(happened: Event) -> bytes:
    """An event, as every negotiated client hears it."""
    seconds, nanoseconds = divmod(happened.time_ns, 1_000_000_000)
    message: dict[str, object] = {
        "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
        "event": happened.name,
    }
    if happened.data:
        message["data"] = happened.data
    return encode(message)
