"""An audit as a job: is what a bitmap calls clean the same on the disk and on its last backup?

What changed behind our back, such as a block device that somebody wrote to while blockd did not
have it, can't be found out in any other way.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap, Pin, Pinned, Reason
from blockd.block import Node, tell_recovered
from blockd.extent import Extent
from blockd.job import Job, JobError


class AuditJob(Job):
    """Compares the clean granules of a bitmap of ``source`` with ``target``, which is not written
    to meanwhile. Guests write on.

    One that differs fails the job, makes everything dirty, and is told in an event.
    """

    kind = "x-blockd-audit"
    block_job = False

    def __init__(
        self,
        job_id: str,
        source: Node,
        bitmap: DirtyBitmap,
        target: Node,
        *,
        sample_bytes: int | None,
        speed: int,
        keep: Callable[[], Awaitable[bool]],
        release: Callable[[], None],
    ) -> None:
        """``sample_bytes``: so much is looked at, in random places; None: all.

        ``keep`` makes the bitmap durable; ``release`` lets go of the nodes.
        """
        # It is kept until it is dismissed, for nothing else tells that all is well.
        super().__init__(job_id, speed=speed, auto_dismiss=False)
        self._source = source
        self._bitmap = bitmap
        self._target = target
        self._pieces = _Pieces(source.size_bytes, sample_bytes)
        self._keep = keep
        self._release = release
        self._pin: Pin | None = None
        self._differs = False

    def start(self) -> None:
        self._pin = self._bitmap.pin(self.id)
        self.set_total(self._pieces.length)

    def revoke(self) -> None:
        self._unpin()

    async def run(self) -> None:
        ours, theirs = (bytearray(limits.BITMAP_AUDIT_PIECE_BYTES) for _ in range(2))
        for piece in self._pieces:
            for run in _clean_runs(self._marked(), piece):
                async with self.turn(run.length):
                    await self._compare(run, memoryview(ours), memoryview(theirs))
            await self.pause_point()
            self.advance(limits.BITMAP_AUDIT_PIECE_BYTES)

    def _marked(self) -> Bits:
        """The bits as they are now; the pin keeps commands from changing them."""
        state = self._bitmap.state
        assert isinstance(state, Pinned)
        return state.bits

    async def _compare(self, run: Extent, ours: memoryview, theirs: memoryview) -> None:
        mine, other = ours[: run.length], theirs[: run.length]
        await self._target.read(run.offset, other)
        await self._source.read(run.offset, mine)
        if mine == other:
            return
        # What guests have written meanwhile was marked before it reached the disk.
        for still_clean in _clean_runs(self._marked(), run):
            within = slice(still_clean.offset - run.offset, still_clean.end - run.offset)
            if mine[within] != other[within]:
                self._differs = True
                raise JobError(
                    f"Node '{self._source.name}' differs from its backup between bytes "
                    f"{still_clean.offset} and {still_clean.end}, where bitmap "
                    f"'{self._bitmap.name}' was clean: now all of it is dirty, and the next "
                    "backup with it copies everything"
                )

    async def prepare(self) -> None:
        await trio.lowlevel.checkpoint()

    def commit(self) -> None:
        self._unpin()

    async def abort(self) -> None:
        self._unpin()
        if self._differs:
            self._mark_all()
            # Whoever hears of it may rely on it, even if the daemon is killed then.
            try:
                await self._keep()
            finally:
                self._tell()
        else:
            await trio.lowlevel.checkpoint()

    def _mark_all(self) -> None:
        bits = self._bitmap.usable_bits().empty_copy()
        bits.mark_all()
        self._bitmap.put_back(bits)
        self._bitmap.reason = Reason.IMAGE_CHANGED

    def _tell(self) -> None:
        tell_recovered(self._bus, self._source.name, self._bitmap, Reason.IMAGE_CHANGED)

    def _unpin(self) -> None:
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()

    async def close(self) -> None:
        self._release()
        await trio.lowlevel.checkpoint()


class _Pieces:
    """The pieces of a node that are looked at, in order; each is made when it is its turn."""

    def __init__(self, size_bytes: int, sample_bytes: int | None) -> None:
        self._size_bytes = size_bytes
        count = _in_pieces(size_bytes)
        self._numbers: Sequence[int] = range(count)
        if sample_bytes is not None:
            self._numbers = sorted(
                random.sample(range(count), min(_in_pieces(sample_bytes), count))
            )

    def __iter__(self) -> Iterator[Extent]:
        for number in self._numbers:
            offset = number * limits.BITMAP_AUDIT_PIECE_BYTES
            yield Extent(offset, min(limits.BITMAP_AUDIT_PIECE_BYTES, self._size_bytes - offset))

    @property
    def length(self) -> int:
        """Bytes of all of them; the node's last piece counts as a whole one."""
        return len(self._numbers) * limits.BITMAP_AUDIT_PIECE_BYTES


def _in_pieces(nbytes: int) -> int:
    return -(-nbytes // limits.BITMAP_AUDIT_PIECE_BYTES)


def _clean_runs(bits: Bits, within: Extent) -> Iterator[Extent]:
    """What is not dirty in the range."""
    offset = within.offset
    for dirty in tuple(bits.extents(*within)):
        if offset < dirty.offset:
            yield Extent(offset, dirty.offset - offset)
        offset = dirty.end
    if offset < within.end:
        yield Extent(offset, within.end - offset)
