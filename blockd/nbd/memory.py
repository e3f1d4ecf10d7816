"""The memory that the connections of a server share, so that many of them cost little."""

from __future__ import annotations

import trio

from blockd import limits


class Burst:
    """A connection's requests, as received, and its replies, until they are sent."""

    def __init__(self) -> None:
        self.requests = memoryview(bytearray(limits.NBD_RECEIVE_BUFFER_BYTES))
        self.replies = bytearray(limits.NBD_SEND_BUFFER_BYTES)
        self.replies_view = memoryview(self.replies)


class Memory:
    """Bursts are lent to connections that are not waiting for their client with nothing received.

    What they read and write beyond bursts is counted, and bounded over all connections.
    """

    def __init__(self) -> None:
        self._free: list[Burst] = []
        self._bytes = 0
        self._turn = trio.Lock()
        self._one_released = trio.Event()

    def borrow(self) -> Burst:
        """The one that was given back last: it is in the processor's cache."""
        return self._free.pop() if self._free else Burst()

    def give_back(self, burst: Burst) -> None:
        if len(self._free) < limits.NBD_BURSTS_KEPT:
            self._free.append(burst)

    async def reserve(self, count: int, *, first: bool) -> None:
        """Wait for room for so many bytes, in turn.

        ``first``: the connection has no other; a small one passes at once, so that those who take
        their replies go on where others hold all the memory by not taking theirs.
        """
        pressing = first and count <= limits.NBD_PRESSING_BYTES
        if not pressing and (self._turn.locked() or not self._has_room(count)):
            async with self._turn:
                while not self._has_room(count):
                    await self._one_released.wait()
        self._bytes += count

    def release(self, count: int) -> None:
        self._bytes -= count
        self._one_released.set()
        self._one_released = trio.Event()

    def _has_room(self, count: int) -> bool:
        return self._bytes + count <= limits.NBD_SERVER_BYTES_IN_FLIGHT
