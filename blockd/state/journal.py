"""The journal of an image: where it is written to, noted before that happens.

A write may go on at once where its granules are marked in this epoch, or where its regions are
armed and the marks can be set. Else it waits until the regions are armed durably.

    a granule's first write in an epoch   one write of a byte to the page cache
    a region's first                      a commit, which all share that wait
    the image's first                     an epoch begins: a marks file, and a commit
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from mmap import mmap

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.state.epoch import Epoch

_BITS = tuple(1 << bit for bit in range(8))


class ImageJournal:
    """``blockd.block.Journal`` over one image.

    ``prepare`` does what the range's notes wait for, or some of it. It is told by
    ``mark_error`` why marks could not be set, and ends all noting with ``give_up``.
    """

    def __init__(self, prepare: Callable[[int, int], Awaitable[None]]) -> None:
        self._prepare = prepare
        self._mirror: mmap | bytes = b""
        self._shift = 0
        self.epoch: Epoch | None = None
        self.armed = BitMap64()
        self.lost = False
        self.mark_error: OSError | None = None

    def begin(self, epoch: Epoch) -> None:
        """From this instant on writes are noted in ``epoch``; regions without marks are disarmed.

        A write into one arms it anew. The ended epoch is the caller's again.
        """
        ended, self.epoch = self.epoch, epoch
        kept = ended is not None and not self.lost and ended.region_shift == epoch.region_shift
        self.armed = BitMap64(ended.regions) if ended is not None and kept else BitMap64()
        self._mirror, self._shift = epoch.mirror, epoch.shift
        self.lost, self.mark_error = False, None

    def end(self) -> None:
        """The epoch has ended and no other began: the next write waits for one."""
        self._mirror, self.epoch, self.armed = b"", None, BitMap64()

    def give_up(self) -> None:
        """Let all writes pass until an epoch begins: it is durable that they are not noted."""
        self.lost = True

    def note_nowait(self, offset: int, length: int) -> bool:
        granule = offset >> self._shift
        if granule == (offset + length - 1) >> self._shift:
            try:
                if self._mirror[granule >> 3] & _BITS[granule & 7]:
                    return True
            except IndexError:
                return self.lost
        return self._note_first(offset, length)

    def _note_first(self, offset: int, length: int) -> bool:
        epoch = self.epoch
        if self.lost:
            return True
        if epoch is None or offset + length > epoch.size_bytes or self._is_long(length):
            return False
        if not self.is_armed(offset, length):
            return False
        if not epoch.marked(offset, length):
            try:
                epoch.mark(offset, length)
            except OSError as error:
                self.mark_error = error
                return False
        return True

    def is_armed(self, offset: int, length: int) -> bool:
        """Whether all regions of the range are armed in this epoch."""
        if self.epoch is None:
            return False
        first = offset >> self.epoch.region_shift
        last = (offset + length - 1) >> self.epoch.region_shift
        if first == last:
            return first in self.armed
        armed: bool = self.armed.contains_range(first, last + 1)
        return armed

    def _is_long(self, length: int) -> bool:
        return length > limits.STATE_MARK_STEP_GRANULES << self._shift

    async def note(self, offset: int, length: int) -> None:
        while not await self._note_in_steps(offset, length):
            await self._prepare(offset, length)

    async def _note_in_steps(self, offset: int, length: int) -> bool:
        """Note the range, others having their turn in between; false where it has to wait.

        In the end all of it is noted in the epoch of that instant.
        """
        if not self._is_long(length):
            return self.note_nowait(offset, length)
        epoch, step = self.epoch, limits.STATE_MARK_STEP_GRANULES << self._shift
        for at in range(offset, offset + length, step):
            if at > offset:
                await trio.lowlevel.checkpoint()
            if self.epoch is not epoch or not self.note_nowait(at, min(step, offset + length - at)):
                return False
        return True
