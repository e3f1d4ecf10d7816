"""What a monitor has still to send: bounded, because a client may never read it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from blockd import limits


class Outbox:
    """Replies and events in the order in which they came to be.

    Once ``closed``, it takes no more and nobody waits for it.
    """

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        """``on_overflow``: called when a message finds no room; the client is to be dropped."""
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._changed = trio.Event()
        self._on_overflow = on_overflow
        self.closed = False

    def put(self, message: bytes) -> None:
        """Add a message; a plain function, so the order is that of the calls."""
        if self.closed:
            return
        if self._messages and self._bytes + len(message) > limits.QMP_OUTBOX_BYTES:
            self._on_overflow()
            return
        self._messages.append(message)
        self._bytes += len(message)
        self._wake()

    def close(self) -> None:
        """Nobody will take anything from here any more."""
        self.closed = True
        self._messages.clear()
        self._bytes = 0
        self._wake()

    async def next(self) -> bytes:
        """Everything that is there, once there is something. It stays until ``sent``."""
        while not self._messages:
            await self._changed.wait()
        return b"".join(self._messages)

    def sent(self, count: int) -> None:
        """The first ``count`` bytes, which are whole messages, have been sent."""
        while count > 0 and not self.closed:
            message = self._messages.popleft()
            count -= len(message)
            self._bytes -= len(message)
        self._wake()

    async def wait_room(self) -> None:
        """Wait until less than half of the room is taken."""
        while self._bytes > limits.QMP_OUTBOX_BYTES // 2:
            await self._changed.wait()

    async def wait_empty(self) -> None:
        """Wait until all has been sent."""
        while self._messages:
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
