"""QMP as it goes over the wire, a line at a time; nothing is negotiated, nothing is put aside."""

from __future__ import annotations

import json
import socket
from types import TracebackType
from typing import Any, Self

from tests.helpers.patience import PATIENCE_SECONDS


class Lines:
    """One client's connection. Waiting too long for a message raises ``TimeoutError``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(PATIENCE_SECONDS)
        self._received = connection.makefile("rb")
        #: Whether the daemon has closed.
        self.at_end = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, text: str | bytes) -> None:
        """Send ``text`` and a line's end."""
        data = text.encode() if isinstance(text, str) else text
        self._connection.sendall(data + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message. Raises ``EOFError`` where the daemon has closed."""
        try:
            line = self._received.readline()
        except ConnectionResetError:
            # It closed without having read everything.
            line = b""
        if not line:
            self.at_end = True
            raise EOFError("the daemon has closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._received.close()
        self._connection.close()
