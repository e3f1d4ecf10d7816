"""How fast a job may copy."""

from __future__ import annotations

from blockd.errors import BlockdError

#: What the speed allows in this time may go out in one burst.
SLICE_SECONDS = 0.1


class RateLimit:
    """A speed in bytes per second, kept over slices of 100 ms; 0 is no limit.

    A chunk may go while the slice has anything left, however large the chunk is. What it takes
    beyond the slice's share stretches the slice: at 262144 bytes per second a chunk of 64 KiB
    goes every 250 ms; at four times that speed two of them go every 125 ms.
    """

    def __init__(self, speed: int) -> None:
        self.speed = speed
        self._start = 0.0
        self._end = 0.0
        self._sent = 0.0

    def ready_at(self, now: float) -> float:
        """The time at which the next chunk may go, in seconds: ``now``, or a later one."""
        if now >= self._end:
            self._start, self._end, self._sent = now, now + SLICE_SECONDS, 0
        self._stretch()
        return max(now, self._end) if self._is_used_up() else now

    def charge(self, nbytes: int) -> None:
        """Count a chunk that goes now; its time has come according to ``ready_at``."""
        if self.speed:
            self._sent += nbytes
            self._stretch()

    def set_speed(self, speed: int) -> None:
        """Change the speed. A faster one shortens a wait at once, a slower one lengthens none.

        Bytes that went at the old speed are paid for at the old speed: counted at a much lower
        one, a single slice of them would hold the job up for minutes.
        """
        if 0 < speed < self.speed:
            self._sent *= speed / self.speed
        self.speed = speed

    def _is_used_up(self) -> bool:
        return self.speed > 0 and self._sent >= self.speed * SLICE_SECONDS

    def _stretch(self) -> None:
        if self._is_used_up():
            self._end = self._start + self._sent / self.speed


def check_speed(speed: int) -> None:
    """Refuse what is not a speed, in the words of QEMU."""
    if speed < 0:
        raise BlockdError("Parameter 'speed' expects a non-negative value")
