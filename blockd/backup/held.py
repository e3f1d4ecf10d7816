"""Old data that a backup keeps in memory on its way from a guest write to the target."""

from __future__ import annotations

import mmap
from collections import deque
from dataclasses import dataclass, field

import trio

from blockd import limits


@dataclass(frozen=True, slots=True, eq=False)
class OldData:
    """Settled clusters from ``first`` up to ``end``, with their data; None: it is all zero."""

    first: int
    end: int
    view: memoryview | None

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on, in bytes from the start of the first cluster."""
        if self.view is None:
            view[:] = bytes(len(view))
        else:
            view[:] = self.view[offset : offset + len(view)]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Old data in a slot of the store."""

    slot: int
    data: OldData


@dataclass(slots=True, eq=False)
class _Waiter:
    woken: trio.Event = field(default_factory=trio.Event)
    slot: int | None = None


class HeldStore:
    """Slots of one cluster each, so many that they fit into ``limits.HELD_BYTES_LIMIT``.

    A run of zeroes takes a slot too, though it needs no memory: so the queue is bounded. Memory
    that no slot has ever used is not taken from the system.
    """

    def __init__(self, cluster_bytes: int) -> None:
        slots = max(1, limits.HELD_BYTES_LIMIT // cluster_bytes)
        self._cluster_bytes = cluster_bytes
        self._memory = mmap.mmap(-1, slots * cluster_bytes)
        self._view = memoryview(self._memory)
        self._zeroes = bytes(cluster_bytes)
        # The last one freed is used next, so that few are ever touched.
        self._free = list(reversed(range(slots)))
        #: The first one has waited longest. While anybody waits, no slot is free.
        self._waiting: deque[_Waiter] = deque()
        self._queue: deque[Held] = deque()
        #: What is in the slots, until they are freed.
        self._stored: dict[int, OldData] = {}
        self._work = trio.lowlevel.ParkingLot()

    def take_slot(self) -> int | None:
        """A free slot, which is the caller's until ``put`` or ``free``; None where all are used."""
        return self._free.pop() if self._free else None

    async def wait_slot(self) -> int | None:
        """A slot, in the order of asking; None where ``release_waiters`` ended the wait."""
        await trio.lowlevel.checkpoint()
        if self._free:
            return self._free.pop()
        waiter = _Waiter()
        self._waiting.append(waiter)
        try:
            await waiter.woken.wait()
        except trio.Cancelled:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.slot is not None:
                # It was given one when it was cancelled already.
                self.free(waiter.slot)
            raise
        return waiter.slot

    def free(self, slot: int) -> None:
        """Give a slot back: to who has waited longest, so that nobody overtakes."""
        self._stored.pop(slot, None)
        if self._waiting:
            self._wake(slot)
        else:
            self._free.append(slot)

    def release_waiters(self) -> None:
        """End every wait for a slot."""
        while self._waiting:
            self._wake(None)

    def _wake(self, slot: int | None) -> None:
        waiter = self._waiting.popleft()
        waiter.slot = slot
        waiter.woken.set()

    def view(self, slot: int, length: int) -> memoryview:
        """The first ``length`` bytes of a slot."""
        start = slot * self._cluster_bytes
        return self._view[start : start + length]

    def put(self, slot: int, data: OldData) -> None:
        """Queue old data for the target; its view, if any, is that of the slot."""
        self._stored[slot] = data
        self._queue.append(Held(slot, data))
        self._work.unpark()

    def find(self, cluster: int) -> OldData | None:
        """The old data of ``cluster``, where it is here: in a slot that is not freed yet."""
        stored = self._stored.values()
        return next((data for data in stored if data.first <= cluster < data.end), None)

    async def get(self) -> Held:
        """The oldest entry of the queue; the caller frees its slot.

        Data that is all zero comes as such: a guest's first write to a hole must not fill it.
        """
        while (held := self.get_nowait()) is None:
            await self._work.park()
        return held

    def put_back(self, held: Held) -> None:
        """Make an entry the oldest again, which was not written after all."""
        self._queue.appendleft(held)
        self._work.unpark()

    def get_nowait(self) -> Held | None:
        """As ``get``; None where the queue is empty."""
        if not self._queue:
            return None
        held = self._queue.popleft()
        data = held.data
        if data.view is not None and self._is_zero(held.slot, len(data.view)):
            return Held(held.slot, OldData(data.first, data.end, None))
        return held

    def _is_zero(self, slot: int, length: int) -> bool:
        start = slot * self._cluster_bytes
        # Comparing bytes is far faster than comparing a memoryview.
        return self._memory[start : start + length] == self._zeroes[:length]
