"""A QMP client for a daemon that runs in the test's own loop."""

from __future__ import annotations

import json
from typing import Any

import trio


class Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def send(self, command: str, **arguments: Any) -> None:
        """Members' names are written with ``_`` for ``-``."""
        sent = {member.replace("_", "-"): value for member, value in arguments.items()}
        await self._stream.send_all(json.dumps({"execute": command, "arguments": sent}).encode())

    async def answer(self) -> dict[str, Any] | None:
        """The next answer, or None at the connection's end; events are left out."""
        while True:
            while b"\n" not in self._buffer:
                data = await self._receive()
                if not data:
                    return None
                self._buffer += data
            line, self._buffer = self._buffer.split(b"\n", 1)
            message: dict[str, Any] = json.loads(line)
            if "return" in message or "error" in message:
                return message

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(65536))
        except trio.BrokenResourceError:
            return b""

    async def execute(self, command: str, **arguments: Any) -> Any:
        await self.send(command, **arguments)
        answer = await self.answer()
        assert answer is not None
        return answer["return"]

    def close(self) -> None:
        self._stream.socket.close()
