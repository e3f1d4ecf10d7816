"""The steps of a handshake: what the connection is to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from blockd.nbd.agreement import ExportInfo
from blockd.nbd.wire import Headers


@dataclass(frozen=True, slots=True)
class NeedData:
    """Receive something, ``feed`` it, ask again."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send ``data``, ask again."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """Send ``reply`` in clear, shake hands by TLS, ask again; nothing goes in clear any more.

    ``early`` is what the client has sent already: the beginning of its TLS handshake. Whatever
    somebody put there for the options of the encrypted session makes that fail.
    """

    reply: bytes
    early: bytes


@dataclass(frozen=True, slots=True)
class Transmission:
    """The handshake is over: take hold of the export, send ``reply``, serve requests.

    ``contexts`` are the numbers of the meta contexts that it selected. ``early`` is what the
    client has sent already after its last option: the first requests.
    """

    export: ExportInfo
    headers: Headers
    contexts: tuple[int, ...]
    reply: bytes
    early: bytes


@dataclass(frozen=True, slots=True)
class SoftDisconnect:
    """The client wishes to leave: send ``reply`` and close. It may be gone already."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class HardDisconnect:
    """Close at once; ``reason`` is for the log and may repeat what the client sent."""

    reason: str


Step: TypeAlias = NeedData | Reply | StartTls | Transmission | SoftDisconnect | HardDisconnect
