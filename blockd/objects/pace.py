"""When the requests of a throttle group may pass: leaky buckets, as QEMU has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

import trio

from blockd.objects.limits import Bucket, ThrottleLimits

#: A wait shorter than this is a rounding error.
_NO_TIME_SECONDS = 1e-9


class _Level:
    """What has been used of one limit lately; it leaks at the limit's rate."""

    def __init__(self, limit: Bucket) -> None:
        self._limit = limit
        self._level = 0.0
        self._burst_level = 0.0

    def leak(self, seconds: float) -> None:
        limit = self._limit
        self._level = max(self._level - limit.average * seconds, 0.0)
        self._burst_level = max(self._burst_level - limit.burst * seconds, 0.0)

    def fill(self, units: float) -> None:
        self._level += units
        self._burst_level += units

    def seconds_until_room(self) -> float:
        limit = self._limit
        if not limit.average:
            return 0.0
        if not limit.burst:
            return max(self._level - limit.average / 10, 0.0) / limit.average
        seconds = max(self._level - limit.burst * limit.burst_seconds, 0.0) / limit.average
        if seconds == 0 and limit.burst_seconds > 1:
            # A long burst is itself no faster than its rate, but for a tenth of a second's units.
            return max(self._burst_level - limit.burst / 10, 0.0) / limit.burst
        return seconds


class _Direction:
    """Reads, or writes: one request at a time waits for the buckets, members take turns."""

    def __init__(self) -> None:
        self.taken = False
        self._waiting: dict[Hashable, deque[trio.Event]] = {}

    async def enter(self, member: Hashable) -> None:
        if not self.taken:
            self.taken = True
            return
        turn = trio.Event()
        self._waiting.setdefault(member, deque()).append(turn)
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():
                self.leave()
            else:
                self._forget(member, turn)
            raise

    def leave(self) -> None:
        member = next(iter(self._waiting), None)
        if member is None:
            self.taken = False
            return
        queue = self._waiting.pop(member)
        turn = queue.popleft()
        if queue:
            # The others come before this member's next one.
            self._waiting[member] = queue
        turn.set()

    def _forget(self, member: Hashable, turn: trio.Event) -> None:
        queue = self._waiting[member]
        queue.remove(turn)
        if not queue:
            del self._waiting[member]


class Pace:
    """The state that the members of a group share."""

    def __init__(self, limits: ThrottleLimits) -> None:
        self._limits = limits
        self._bytes = (
            _Level(limits.bps_total),
            _Level(limits.bps_read),
            _Level(limits.bps_write),
        )
        self._operations = (
            _Level(limits.iops_total),
            _Level(limits.iops_read),
            _Level(limits.iops_write),
        )
        self._leaked_at: float | None = None
        self._reads = _Direction()
        self._writes = _Direction()

    def has_room(self, *, writes: bool) -> bool:
        """Whether a request may pass now; one that then does is to be counted (``count``)."""
        direction = self._writes if writes else self._reads
        return not direction.taken and self._seconds_until_room(writes=writes) <= 0

    def count(self, *, writes: bool, length: int) -> None:
        """Count a request that passes."""
        size = self._limits.iops_size
        operations = max(length / size, 1.0) if size > 0 else 1.0
        for bucket, units in zip(
            self._buckets(writes=writes), (length, length, operations, operations), strict=True
        ):
            bucket.fill(units)

    async def account(self, member: Hashable, *, writes: bool, length: int) -> None:
        """Wait until a request of ``member`` may pass, then count it."""
        direction = self._writes if writes else self._reads
        await direction.enter(member)
        try:
            # Asked again, for the other direction may have filled the common buckets meanwhile.
            while (seconds := self._seconds_until_room(writes=writes)) > 0:  # noqa: ASYNC110 - until then
                await trio.sleep(seconds)
            self.count(writes=writes, length=length)
        finally:
            direction.leave()

    def _buckets(self, *, writes: bool) -> tuple[_Level, _Level, _Level, _Level]:
        which = 2 if writes else 1
        return self._bytes[0], self._bytes[which], self._operations[0], self._operations[which]

    def _seconds_until_room(self, *, writes: bool) -> float:
        now = trio.current_time()
        seconds = 0.0 if self._leaked_at is None else now - self._leaked_at
        self._leaked_at = now
        for bucket in (*self._bytes, *self._operations):
            bucket.leak(seconds)
        seconds = max(bucket.seconds_until_room() for bucket in self._buckets(writes=writes))
        return 0.0 if seconds < _NO_TIME_SECONDS else seconds
