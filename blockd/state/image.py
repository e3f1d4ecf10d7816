"""An image whose node is open, and what is kept of it."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import msgspec
import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.bitmap import DirtyBitmap, Reason
from blockd.block import Node
from blockd.state import changes, marks
from blockd.state.arming import Arming
from blockd.state.checkpoint import Storing, begin_storing, store_pieces, windows_of
from blockd.state.coming import ComingBitmaps
from blockd.state.commits import Pending
from blockd.state.environment import Environment
from blockd.state.epoch import Epoch
from blockd.state.epochs import end_epoch, look_at, make_epoch
from blockd.state.journal import ImageJournal
from blockd.state.kept import Kept, KeptBitmaps
from blockd.state.losses import Losses
from blockd.state.records import ArmedRow, BitmapTitle, Identity, ImageRecord

_log = logging.getLogger(__name__)


class StoredImage:
    """Keeps the persistent bitmaps of one node, and has its journal.

    At any instant, what is stored with the marks (or the armed regions) of the epochs since is a
    superset of what is dirty: or else it is durable that this is not so ("poison").
    """

    def __init__(
        self,
        environment: Environment,
        node: Node,
        record: ImageRecord,
        kept: Mapping[DirtyBitmap, Kept],
        *,
        as_stored: bool,
    ) -> None:
        """``as_stored`` False: the bitmaps must be stored before the image is written to."""
        self._environment = environment
        self._commits = environment.commits
        self.node = node
        self.record = record
        self._kept = KeptBitmaps(kept)
        self._sound = as_stored
        #: How the image is, of a node that is read-only: whoever changes it then is another.
        self._known: Identity | None = None
        self.journal = ImageJournal(self._prepare)
        self._arming = Arming(environment, self.journal, record.row)
        #: Regions with marks in ended epochs that no checkpoint has stored yet.
        self._unstored = BitMap64()
        self._scan_all = True
        self._changing = trio.Lock()
        self._giving_up = trio.Lock()
        self._begun = self._done = 0
        self._want_whole = False
        self._closing = False
        self.losses = Losses(environment, node, record.row)
        #: A checkpoint makes those durable that were added here.
        self.coming = ComingBitmaps(environment.rows)
        self._title_rows: WeakKeyDictionary[DirtyBitmap, int] = WeakKeyDictionary()
        #: Rows of pieces that nothing refers to any more.
        self._garbage: list[int] = []
        self._due = trio.current_time() + limits.STATE_CHECKPOINT_SECONDS

    # -- what writes wait for ----------------------------------------------------------------

    async def _prepare(self, offset: int, length: int) -> None:
        """Do one of the things that the range's notes wait for. It never raises ``OSError``.

        Whoever waits may be cancelled, since the disk may hang; what he waits for goes on.
        """
        error, epoch = self.journal.mark_error, self._covering(offset + length)
        if self._sound and error is None and epoch is not None:
            try:
                if not self.journal.is_armed(offset, length):
                    await self._arming.arm(epoch, offset, length)
                return
            except OSError as failed:
                error = failed
        work = partial(self._make_ready, offset + length, error)
        await self._environment.bounded.do(work, math.inf)

    async def _make_ready(self, end: int, error: OSError | None) -> None:
        """For writes up to ``end``; ``error``: why they can't be noted as it is."""
        try:
            if error is not None:
                raise error
            if self._sound:
                await self._begin_for(end)
            else:
                await self.checkpoint()
        except OSError as problem:
            await self._give_up(problem)

    def _covering(self, end: int) -> Epoch | None:
        """The epoch, if there is one which was made for so large an image."""
        epoch = self.journal.epoch
        return epoch if epoch is not None and end <= epoch.size_bytes else None

    async def _begin_for(self, end: int) -> None:
        async with self._changing:
            # The write may have gone, and its node be about to close.
            gone = self._closing or self.node.read_only
            if self._covering(end) is None and not (self.journal.lost or gone):
                await end_epoch(self._begin(await self._make_epoch()))

    async def _give_up(self, error: OSError) -> None:
        """Let writes pass although they can't be noted, once it is durable that this is so."""
        async with self._giving_up:
            epoch = self.journal.epoch
            if self.journal.lost:
                return
            await self._poison(error)
            # Another one may have begun meanwhile, in which it is worth trying.
            if self.journal.epoch is epoch:
                self.journal.give_up()

    @property
    def lacks(self) -> bool:
        """Whether a crash would make a bitmap lack anything."""
        return any(map(self._kept.lacks, self._persistent()))

    async def give_up_storing(self) -> None:
        """The bitmaps are not stored in time: return once no crash makes one lack anything."""
        if self.lacks:
            await self._give_up(OSError(errno.ETIMEDOUT, "it does not answer"))

    async def _poison(self, error: OSError) -> None:
        await self.losses.poison(self._epoch_number, error)

    # -- epochs ------------------------------------------------------------------------------

    @property
    def _epoch_number(self) -> int:
        """Of the epoch in which writes are noted, or else of the last."""
        epoch = self.journal.epoch
        return self.record.epoch if epoch is None else epoch.number

    def _many_epochs(self) -> bool:
        """Whether there are as many as may be there at once."""
        oldest = max(self._kept.oldest_epoch, self.record.since)
        return self.record.epoch - oldest >= limits.STATE_EPOCHS

    async def _make_epoch(self) -> Epoch:
        """The next epoch, which is recorded unless the bitmaps must be stored before."""
        await self._compare()
        await self.losses.record()
        titles = [self._title(bitmap) for bitmap in self._persistent()]
        epoch, self._opened = await make_epoch(
            self._environment, self.node, self.record, titles, commit=self._sound
        )
        if self._sound:
            self.record = self._opened
        else:
            self.record = msgspec.structs.replace(self.record, epoch=epoch.number)
        return epoch

    async def _compare(self) -> None:
        """Find out whether others have written to the image while the node was read-only."""
        if self._known is None:
            return
        _, now = await look_at(self.node)
        if not self._known.same_times(now):
            self._sound = False
            for bitmap in self._persistent():
                bitmap.distrust(Reason.IMAGE_CHANGED)
                self._environment.listener.bitmap_recovered(self.node, bitmap)
        self._known = now if self.node.read_only else None

    def _begin(self, epoch: Epoch) -> Epoch | None:
        """The instant between two epochs; the result is the ended one."""
        ended, lost = self.journal.epoch, self.journal.lost
        if ended is not None:
            if lost or ended.region_shift != epoch.region_shift:
                self._scan_all = True
            self._unstored |= ended.regions
        self.journal.begin(epoch)
        return ended

    def _persistent(self) -> Sequence[DirtyBitmap]:
        return [bitmap for bitmap in self.node.bitmaps.kept() if not bitmap.inconsistent]

    def _title(self, bitmap: DirtyBitmap) -> BitmapTitle:
        kept = self._kept.get(bitmap)
        if kept is not None:
            row = kept.record.title.row
        else:
            row = self._title_rows.setdefault(bitmap, next(self._environment.rows))
        return BitmapTitle(
            row, bitmap.name, bitmap.granularity_bytes, bitmap.recording, bitmap.identity
        )

    # -- checkpoints -------------------------------------------------------------------------

    async def checkpoint(self, *, whole: bool = True, last: bool = False) -> None:
        """Store the bitmaps as they are at some instant from now on. Raises ``OSError``.

        ``whole`` False: those that changed by guest writes only may stay as they are stored, for
        the marks tell of that. Those who wait while one is under way share the next. Once the
        node is being closed, only the ``last`` does anything.
        """
        self._want_whole |= whole
        wanted = self._begun + 1
        async with self._changing:
            if self._done >= wanted or (self._closing and not last):
                return
            self._begun += 1
            number, started, stored = self._begun, trio.current_time(), False
            try:
                while await self._store():
                    pass
                stored = True
            except OSError as error:
                _log.warning("node '%s': its bitmaps can't be stored: %s", self.node.name, error)
                await self._make_do(error)
                raise
            finally:
                self._pace(started)
                # What another one waits for was not done: it falls to the next.
                self._want_whole = self._want_whole or not stored
            self._done = number
        if self._sound:
            self.losses.stored(self.record.since)

    async def _make_do(self, error: OSError) -> None:
        """A checkpoint failed: do without what can't be kept, and what nothing relies on."""
        if self._differs() or self._many_epochs():
            await self._give_up(error)
        # All is dirty without the epochs before, too.
        await self._collect(self._epoch_number if self.losses.failed else None)

    def _owes(self) -> bool:
        """Whether other bitmaps are stored than there are, but for guest writes."""
        return self._differs() or not self._kept.keys() <= set(self._persistent())

    def _differs(self) -> bool:
        """Whether bitmaps have changed, but for guest writes, from what is stored of them."""
        return not self._sound or any(map(self._kept.changed, self._persistent()))

    def _to_store(self) -> Sequence[DirtyBitmap]:
        """What has to be stored now: all, or what changed otherwise than by guest writes.

        All, too, where writes were not noted: then nothing relies on the marks any more.
        """
        bitmaps = self._persistent()
        fresh = not self._sound or self.losses.failed
        if self._want_whole or fresh or self._many_epochs():
            self._want_whole = False
            return bitmaps
        return [bitmap for bitmap in bitmaps if self._kept.changed(bitmap)]

    async def _store(self) -> bool:
        """One checkpoint; true where a bitmap changed meanwhile, so that one more is needed.

        Nothing counts of one that is too late: bitmaps count as they were at one instant, for
        one may have taken over what another had.
        """
        epoch = await self._make_epoch()
        ended, there = self._begin(epoch), self._persistent()
        storings = [self._begin_storing(bitmap, epoch) for bitmap in self._to_store()]
        whole, size_bytes = len(storings) == len(there), self.node.size_bytes
        armed = ArmedRow(epoch.number, epoch.region_shift, self.journal.armed.serialize())
        added = [storing.added for storing in storings]
        try:
            await end_epoch(ended)
            for storing in storings:
                await store_pieces(storing, self._commits, self._environment.rows)
            if stale := any(storing.stale for storing in storings):
                self._want_whole = self._want_whole or whole
                self._garbage += chain(*added)
            else:
                await self._flip(there, storings, armed, size_bytes if whole else None)
        except BaseException:
            self._garbage += chain(*added)
            raise
        await self._collect(epoch.number if whole and not stale else None)
        return stale

    def _begin_storing(self, bitmap: DirtyBitmap, epoch: Epoch) -> Storing:
        kept = self._kept.get(bitmap)
        old = kept.record if kept is not None and kept.version == bitmap.version else None
        windows = None
        if not self._scan_all:
            shift, granularity_bytes = epoch.region_shift, bitmap.granularity_bytes
            windows = windows_of(self._unstored, shift, granularity_bytes)
        return begin_storing(bitmap, self._title(bitmap), epoch.number, old, windows)

    async def _flip(
        self,
        there: Collection[DirtyBitmap],
        storings: Sequence[Storing],
        armed: ArmedRow,
        size_bytes: int | None,
    ) -> None:
        """Make the new pieces those that count; ``size_bytes``: of the image, if all are new.

        ``there``: the bitmaps at the instant. ``armed``: what was, and so may be written to since.
        """
        there = set(there)
        kept = KeptBitmaps((each, old) for each, old in self._kept.items() if each in there)
        new = []
        for storing in storings:
            pieces = tuple(storing.pieces[window] for window in sorted(storing.pieces))
            new.append(msgspec.structs.replace(storing.record, pieces=pieces))
            kept[storing.bitmap] = Kept(new[-1], storing.version, storing.gains)
        rows = {each.record.title.row for each in kept.values()}
        image = msgspec.structs.replace(
            self.record if self._sound else self._opened,
            bitmaps=self.coming.beside([each.record.title for each in kept.values()]),
        )
        steps = [changes.put_bitmaps(image.row, new, rows)]
        if size_bytes is not None:
            image = msgspec.structs.replace(image, size_bytes=size_bytes, since=armed.epoch)
            steps.append(changes.disarm(image.row, armed.epoch))
        steps.append(changes.put_armed(image.row, next(self._environment.rows), armed))
        await self._commits.commit(Pending(changes.all_of(changes.put_image(image), *steps)))
        self._settle(image, kept, storings, whole=size_bytes is not None)

    def _settle(
        self,
        image: ImageRecord,
        kept: KeptBitmaps,
        storings: Sequence[Storing],
        *,
        whole: bool,
    ) -> None:
        """The commit is durable: go by it."""
        for storing in storings:
            self._garbage += storing.obsolete
        used = kept.piece_rows()
        self._garbage += self._kept.piece_rows()
        self._garbage = [row for row in dict.fromkeys(self._garbage) if row not in used]
        self.record, self._kept = image, kept
        if whole:
            self._sound = True
            self._scan_all = False
            self._unstored = BitMap64()

    async def _collect(self, epoch: int | None) -> None:
        """Delete what is of no use any more; what can't be stays, and does no harm."""
        with suppress(OSError):
            while self._garbage:
                rows = self._garbage[: limits.STATE_DELETE_PIECES]
                await self._commits.commit(Pending(changes.delete_pieces(rows)))
                del self._garbage[: len(rows)]
        if epoch is not None:
            await trio.to_thread.run_sync(
                marks.delete, self._environment.disk, self.record.row, epoch
            )

    def _pace(self, started: float) -> None:
        took = trio.current_time() - started
        rest = max(limits.STATE_CHECKPOINT_SECONDS, took / limits.STATE_CHECKPOINT_SHARE)
        self._due = trio.current_time() + rest

    @property
    def due(self) -> bool:
        """Whether a checkpoint would be of use, and is not too much."""
        if self._changing.locked():
            return False
        if self.losses.failed or self._owes():
            return trio.current_time() >= self._due - max(
                0, limits.STATE_CHECKPOINT_SECONDS - limits.STATE_RETRY_SECONDS
            )
        epoch = self.journal.epoch
        idle = not self.record.open if epoch is None else not (self.journal.armed or epoch.regions)
        return not idle and trio.current_time() >= self._due
