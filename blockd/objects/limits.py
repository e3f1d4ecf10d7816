"""What a throttle group lets through, as QEMU says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from blockd.errors import BlockdError

#: QEMU's bound of every rate and burst, and of what a burst may let through in all.
RATE_MAX = 10**15


@dataclass(frozen=True, slots=True)
class Bucket:
    """One limit. ``average``: in a second, 0 for no limit. ``burst``: the same for
    ``burst_seconds`` at the most, 0 for none.
    """

    average: int = 0
    burst: int = 0
    burst_seconds: int = 1

    def check(self) -> None:
        """Raise ``BlockdError`` where the numbers can't be, in QEMU's order."""
        if not (0 <= self.average <= RATE_MAX and 0 <= self.burst <= RATE_MAX):
            raise BlockdError(f"bps/iops/max values must be within [0, {RATE_MAX}]")
        if self.burst_seconds == 0:
            raise BlockdError("the burst length cannot be 0")
        if self.burst_seconds > 1 and not self.burst:
            raise BlockdError("burst length set without burst rate")
        if self.burst and self.burst_seconds > RATE_MAX // self.burst:
            raise BlockdError("burst length too high for this burst rate")
        if self.burst and not self.average:
            raise BlockdError("bps_max/iops_max require corresponding bps/iops values")
        if self.burst and self.burst < self.average:
            raise BlockdError("bps_max/iops_max cannot be lower than bps/iops")


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """Bytes and requests, of reads, of writes, and of both together.

    ``iops_size``: a request of more bytes counts as many times as that goes into it, parts of a
    time included; 0: each counts once.
    """

    bps_total: Bucket = Bucket()
    bps_read: Bucket = Bucket()
    bps_write: Bucket = Bucket()
    iops_total: Bucket = Bucket()
    iops_read: Bucket = Bucket()
    iops_write: Bucket = Bucket()
    iops_size: int = 0

    def check(self) -> None:
        """Raise ``BlockdError`` where they contradict each other, in QEMU's order."""
        for total, read, write in (
            (self.bps_total, self.bps_read, self.bps_write),
            (self.iops_total, self.iops_read, self.iops_write),
        ):
            if (total.average and (read.average or write.average)) or (
                total.burst and (read.burst or write.burst)
            ):
                raise BlockdError(
                    "bps/iops/max total values and read/write values cannot be used at the same "
                    "time"
                )
        requests = (self.iops_total, self.iops_read, self.iops_write)
        if self.iops_size and not any(bucket.average for bucket in requests):
            raise BlockdError("iops size requires an iops value to be set")
        for bucket in self._buckets():
            bucket.check()

    def _buckets(self) -> Iterator[Bucket]:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Bucket):
                yield value
