"""An image from when its node is attached to the node's end, and what others do to it meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import trio

from blockd.state import changes, marks
from blockd.state.changes import Apply
from blockd.state.commits import Pending
from blockd.state.epochs import end_epoch, hold_place, look_at
from blockd.state.image import StoredImage
from blockd.state.places import sync_and_identify
from blockd.state.records import Identity


class KeptImage(StoredImage):
    """Recorded as closed whenever only others can write to the image."""

    def found(self, identity: Identity) -> None:
        """How the image was when its node was attached."""
        if self.node.read_only:
            self._known = identity

    async def keep(self, *, after: Sequence[KeptImage] = ()) -> None:
        """As ``StateDirectory.keep``. Raises ``OSError``.

        What those of ``after`` lack is stored before: they may have taken it over from this one.
        """
        for other in after:
            if other is not self and other.lacks and not other.losses.failed:
                with suppress(OSError):
                    await other.keep()
        if not self.node.read_only:
            await self.checkpoint(whole=False)
        elif self._owes():
            await self.settle()

    async def look_after(self) -> None:
        """What is done again and again while the node is open."""
        with suppress(OSError):
            await self.losses.record()
            if self.due:
                await (self.settle() if self.node.read_only else self.checkpoint())

    async def settle(self) -> None:
        """As ``StateDirectory.settle``. Raises ``OSError``."""
        stored = await self._store_last() and self._all_stored()
        if stored and self.node.read_only and not self._closing:
            _, fd = hold_place(self.node)
            # A write from now on waits for another epoch, and so for the record.
            ended = self.journal.epoch
            self.journal.end()
            try:
                async with self._changing:
                    await self._record_closed(fd)
            finally:
                await end_epoch(ended)
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(os.close, fd)
        if self._known is None and self.node.read_only:
            closed = not self.record.open
            self._known = self.record.identity if closed else (await look_at(self.node))[1]

    @asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        """As ``StateDirectory.closing``."""
        # Nobody else may change the image before it is recorded how it was left.
        fd: int | None = None
        # What ends this early leaves the image as one that may have been written to.
        stored = True
        try:
            self._closing = True
            if stored := await self._store_last():
                with suppress(OSError):
                    _, fd = hold_place(self.node)
            yield
            if stored and fd is not None and not self._written_since():
                await self._record_closed(fd)
                stored = False
        finally:
            ended = self.journal.epoch
            self.journal.end()
            with trio.CancelScope(shield=True):
                if stored:
                    # Nobody would find out what is done to the image from now on.
                    await self._poison(OSError(errno.EIO, "the image was not closed cleanly"))
                await end_epoch(ended)
                if fd is not None:
                    await trio.to_thread.run_sync(os.close, fd)

    async def _store_last(self) -> bool:
        """Whether the image is to be recorded as closed, for its bitmaps are stored."""
        async with self._changing:
            # One that was under way has ended; of a node that is being closed no other begins.
            pass
        if not self.record.open and not self._owes():
            return False
        try:
            if not self._all_stored() or self.losses.failed or self._owes():
                await self.checkpoint(last=True)
        except OSError as error:
            # What is stored of an image that nobody wrote to stays right.
            if self.record.open:
                await self._give_up(error)
            return False
        return True

    def _all_stored(self) -> bool:
        """Whether nothing was written to the image since all was stored."""
        epoch = self.journal.epoch
        return epoch is not None and not (epoch.regions or self._unstored or self._scan_all)

    def _written_since(self) -> bool:
        """Whether anything was noted after the last checkpoint: nothing should have been."""
        epoch = self.journal.epoch
        return epoch is not None and bool(epoch.regions)

    async def _record_closed(self, fd: int) -> None:
        try:
            identity = await trio.to_thread.run_sync(sync_and_identify, fd)
            identity = self._known or identity
            await self._commits.commit(Pending(self._closing_change(identity)))
        except OSError as error:
            await self._poison(error)
            return
        await trio.to_thread.run_sync(self._drop_marks)

    def _drop_marks(self) -> None:
        """Nothing needs them any more; what can't be dropped does no harm."""
        disk, row = self._environment.disk, self.record.row
        if not self._kept:
            marks.delete(disk, row)
            return
        with suppress(OSError):
            marks.drop(disk, marks.marks_name(row, self.record.epoch))

    def _closing_change(self, identity: Identity) -> Apply:
        settled_ns = identity.inode_changed_ns
        self.record = msgspec.structs.replace(
            self.record, open=False, identity=identity, settled_ns=settled_ns
        )
        if not self._kept:
            return changes.forget_image(self.record.row)
        disarm = changes.disarm(self.record.row, self.record.epoch + 1)
        return changes.all_of(changes.put_image(self.record), disarm)
