"""Arming regions, durably, before the first write into each; all that wait share a commit."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyroaring import BitMap64

from blockd.state import changes
from blockd.state.commits import Pending
from blockd.state.environment import Environment
from blockd.state.epoch import Epoch
from blockd.state.journal import ImageJournal
from blockd.state.records import ArmedRow


@dataclass(eq=False, slots=True)
class _Batch:
    """Regions that the next commit arms, and the epoch in which it began."""

    pending: Pending
    shift: int
    regions: BitMap64 = field(default_factory=BitMap64)
    epoch: Epoch | None = None


class Arming:
    """The regions of one image that are to be armed."""

    def __init__(self, environment: Environment, journal: ImageJournal, image: int) -> None:
        self._environment = environment
        self._journal = journal
        self._image = image
        self._next: _Batch | None = None

    async def arm(self, epoch: Epoch, offset: int, length: int) -> None:
        """Arm the range's regions, in ``epoch`` if it still is one then. Raises ``OSError``.

        May be cancelled: then they are armed, but for who asks again, as for a crash.
        """
        if self._next is None:
            self._next = self._new_batch(epoch.region_shift)
        batch = self._next
        first, last = offset >> epoch.region_shift, (offset + length - 1) >> epoch.region_shift
        batch.regions.add_range(first, last + 1)
        await self._environment.commits.commit(batch.pending, shield=False)
        # After the instant of a checkpoint the armed rows of the epoch before it are forgotten.
        now = self._journal.epoch
        if now is not None and now is batch.epoch and now.region_shift == batch.shift:
            self._journal.armed |= batch.regions

    def _new_batch(self, shift: int) -> _Batch:
        def begin() -> None:
            self._next, batch.epoch = None, self._journal.epoch
            number = -1 if batch.epoch is None else batch.epoch.number
            row = ArmedRow(number, shift, batch.regions.serialize())
            id_ = next(self._environment.rows)
            batch.pending.apply = changes.put_armed(self._image, id_, row)

        batch = _Batch(Pending(begin=begin), shift)
        return batch
