"""What a client may say when: the greeting, the negotiation, then commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blockd import __version__
from blockd.errors import BlockdError, CommandNotFoundError

#: QEMU's version whose commands these are; clients look at it to know what they may ask for.
VERSION: dict[str, Any] = {
    "qemu": {"micro": 2, "minor": 0, "major": 10},
    "package": f"blockd {__version__}",
}
GREETING: dict[str, Any] = {"QMP": {"version": VERSION, "capabilities": []}}

NEGOTIATION = "qmp_capabilities"


@dataclass(frozen=True, slots=True)
class Request:
    """One command as sent: ``arguments`` are not checked yet."""

    name: str
    arguments: dict[str, Any]


def parse_request(message: Any) -> Request:
    """Check a message's envelope. Raises ``BlockdError``."""
    if not isinstance(message, dict):
        raise BlockdError("QMP input must be a JSON object")
    for member, value in message.items():
        if member == "execute" and not isinstance(value, str):
            raise BlockdError("QMP input member 'execute' must be a string")
        if member == "arguments" and not isinstance(value, dict):
            raise BlockdError("QMP input member 'arguments' must be an object")
        if member not in ("execute", "arguments", "id"):
            raise BlockdError(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise BlockdError("QMP input lacks member 'execute'")
    return Request(message["execute"], message.get("arguments", {}))


class Session:
    """One client's phase."""

    def __init__(self) -> None:
        self.negotiated = False

    def admit(self, name: str) -> None:
        """Raise ``CommandNotFoundError`` unless the command is one of this phase."""
        if self.negotiated and name == NEGOTIATION:
            raise CommandNotFoundError(
                "Capabilities negotiation is already complete, command ignored"
            )
        if not self.negotiated and name != NEGOTIATION:
            raise CommandNotFoundError("Expecting capabilities negotiation with 'qmp_capabilities'")

    def negotiate(self, capabilities: Sequence[str]) -> None:
        """End the negotiation. Raises ``BlockdError`` for a capability that was not offered."""
        for capability in capabilities:
            raise BlockdError(f"Capability {capability} not available")
        self.negotiated = True
