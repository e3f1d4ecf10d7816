"""A QMP client as small as can be: one connection, one command at a time, events kept aside."""

from __future__ import annotations

import json
import socket
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.helpers.patience import PATIENCE_SECONDS

#: Longer than any answer or event takes, so that it only bounds a hang.


class QmpError(Exception):
    """The daemon answered with an error."""

    def __init__(self, error_class: str, description: str) -> None:
        super().__init__(f"{error_class}: {description}")
        self.error_class = error_class
        self.description = description


class QmpClient:
    """A negotiated client. Waiting too long for the daemon raises ``TimeoutError``."""

    def __init__(
        self,
        daemon: Path | str | socket.socket,
        *,
        patience_seconds: float | None = PATIENCE_SECONDS,
    ) -> None:
        """``daemon``: its socket's path, or a connection to it that has received nothing yet."""
        #: Events that came and that nobody has asked for yet.
        self.events: deque[dict[str, Any]] = deque()
        if isinstance(daemon, socket.socket):
            self._socket = daemon
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(daemon))
        self._socket.settimeout(patience_seconds)
        self._lines = self._socket.makefile("rb")
        self.greeting = self._receive()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Carry out a command and return its result. Raises ``QmpError``, or ``EOFError``."""
        message: dict[str, Any] = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        self._socket.sendall(json.dumps(message).encode())
        while True:
            answer = self._receive()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(answer["error"]["class"], answer["error"]["desc"])
            else:
                return answer["return"]

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of this name that has these data; the events before it are dropped.

        Members' names are written with ``_`` for ``-``.
        """
        wanted = {member.replace("_", "-"): value for member, value in data.items()}
        while True:
            event = self.next_event()
            if event["event"] == name and wanted.items() <= event.get("data", {}).items():
                return event

    def next_event(self) -> dict[str, Any]:
        """The oldest event that nobody has asked for; wait for one if need be."""
        return self.events.popleft() if self.events else self._receive()

    def events_to_the_end(self) -> list[dict[str, Any]]:
        """All events that nobody has asked for, up to the one after which the daemon closed."""
        try:
            while True:
                self.events.append(self._receive())
        except EOFError:
            return list(self.events)

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = b""
        if not line:
            raise EOFError("the daemon has closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message
