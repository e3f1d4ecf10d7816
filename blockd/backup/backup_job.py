"""A backup as a job: what happens at its start, at its end, and when it fails."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from blockd.backup.clusters import Clusters
from blockd.backup.copier import Copier, OnErrors
from blockd.backup.frozen_bitmap import FrozenBitmap
from blockd.backup.incomplete import BitmapNeed, IncompleteMark
from blockd.backup.plan import BackupPlan, BitmapMode, Sync
from blockd.backup.target_file import TargetFile
from blockd.bitmap import Bits
from blockd.block import BeforeWrite, Node
from blockd.job import Job, JobError

_log = logging.getLogger(__name__)


class JobRecord(Protocol):
    """What is kept of a job where a crash does not reach it. Neither call raises."""

    async def begin(self) -> None:
        """Return once the record is durable, before anything is copied."""

    async def end(self) -> None:
        """Return once the source's bitmaps are durable as the job has left them."""


class BackupJob(Job):
    """Copies what ``source`` holds at the job's start to ``target``, while guests write on.

    Whoever makes it holds both nodes for it; ``close`` calls ``release``.
    """

    def __init__(
        self,
        job_id: str,
        plan: BackupPlan,
        source: Node,
        target: Node,
        *,
        on_errors: OnErrors,
        empty_target: Callable[[], Awaitable[None]] | None = None,
        target_path: str | None = None,
        release: Callable[[], Awaitable[None]] | None = None,
        record: JobRecord | None = None,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """``plan`` is for these nodes. ``target_path`` is the target's, if it is a regular file.

        ``empty_target`` is awaited before the first byte is copied, once the mark is there.
        ``release`` is awaited at the very end: it lets go of the nodes. ``record`` is for what
        outlives the daemon.
        """
        super().__init__(
            job_id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss
        )
        self._plan = plan
        self._source = source
        self._target = target
        self._on_errors = on_errors
        self._empty_target = empty_target
        self._release = release
        self._record = record
        self._mark: IncompleteMark | None = None
        self._target_file: TargetFile | None = None
        if target_path is not None:
            self._mark = self._make_mark(target_path)
            self._target_file = TargetFile.of(target, target_path)
        #: Something may have been done to the target.
        self._touched = False
        self._emptied = False
        self._doubts = 0
        self._frozen: FrozenBitmap | None = None
        self._clusters: Clusters
        self._copier: Copier
        #: After copying has ended well: what was left out.
        self._unsaved: Bits | None = None
        #: The bitmap was unfrozen with everything in it that is missing on the target.
        self._bitmap_knows_all = False

    def _make_mark(self, target_path: str) -> IncompleteMark:
        used = self._plan.used
        need = None if used is None else BitmapNeed.of(self._source.name, used.bitmap)
        return IncompleteMark(
            target_path,
            self.id,
            full=not self._plan.sync.by_bitmap,
            need=need,
            emptied=self._empty_target is not None,
            layer=self._target.driver.supports_backing,
            forgets=used is not None and used.mode is BitmapMode.ALWAYS,
        )

    # -- the start ---------------------------------------------------------------------------

    def start(self) -> None:
        """Freeze the bitmap and put the point-in-time view in; the source is quiesced."""
        used = self._plan.used
        frozen = None if used is None else FrozenBitmap(used, self._plan.sync, self.id)
        try:
            self._clusters = Clusters(
                self._source.size_bytes,
                self._plan.cluster_bytes,
                None if frozen is None else frozen.wanted,
            )
            self._copier = Copier(
                self,
                self._source,
                self._target,
                self._clusters,
                self._on_errors,
                plan=self._plan,
            )
        except BaseException:
            if frozen is not None:
                frozen.revoke()
            raise
        self._frozen = frozen
        for hook in self._hooks():
            self._source.add_hook(hook)
        self._copier.show_instant()
        self.set_total((self._clusters.count_at_once() or 0) << self._clusters.shift)

    def revoke(self) -> None:
        self._remove_hooks()
        self._copier.hide_instant(lost=False)
        if self._frozen is not None:
            self._frozen.revoke()

    async def run(self) -> None:
        try:
            if self._mark is not None:
                await self._mark.put()
            if self._record is not None:
                await self._record.begin()
            await trio.lowlevel.checkpoint_if_cancelled()
            self._touched = True
            self._doubts = self._target.doubts
            await self._empty()
            await self._copier.run()
        finally:
            self._copier.hook.abandon()

    async def _empty(self) -> None:
        if self._empty_target is not None and not self._emptied:
            await self._empty_target()
            self._emptied = True

    # -- the end -----------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the target durable, and say so."""
        await self._secure()
        if self._copier.discard is not None:
            await self._copier.discard.finish()
        self._unsaved = await self._list_unsaved()
        if self._clusters.skipped:
            nbytes = self._clusters.skipped << self._clusters.shift
            _log.warning("job '%s' went without %d bytes that it could not copy", self.id, nbytes)
        elif self._mark is not None:
            await self._mark.satisfy()

    async def _secure(self) -> None:
        """Return once all that was copied is durable in the target file, where all can find it."""
        if self._frozen is not None and not self._source.read_only:
            # Else a crash could take back what guests had written before the instant, and the disk
            # would differ from its backup where the bitmap has nothing.
            await self._source.flush()
        await self._flush_target()
        if self._target_file is not None:
            await trio.to_thread.run_sync(self._target_file.check)

    async def _flush_target(self) -> None:
        """Raises ``OSError`` also where what was written before may be gone all the same."""
        await self._target.flush()
        if self._target.doubts != self._doubts:
            raise OSError(
                errno.EIO, "the target was away, and may have lost what it had not flushed"
            )

    def commit(self) -> None:
        self._end(succeeded=True, unsaved=self._unsaved)

    async def abort(self) -> None:
        """Give the bitmap back, with all that may be missing on the target.

        A bitmap must not stay frozen for good: where guest writes or the target hang for too
        long, it gets back everything.
        """
        self._copier.hook.abandon()
        try:
            if self.cancelled and self._plan.sync is Sync.NONE:
                # That is how such a backup ends well: its target has all that it kept.
                drained = await self._drain()
                self._copier.hide_instant(lost=not drained)
            else:
                self._copier.hide_instant(lost=True)
            unsaved = await self._list_unsaved_after_failure()
            async with self._source.quiesced():
                self._end(succeeded=False, unsaved=unsaved)
        finally:
            self._remove_hooks()
            if self._frozen is not None:
                self._frozen.conclude(self._clusters, succeeded=False, unsaved=None)

    async def _drain(self) -> bool:
        """Bring all that is kept to the target, which has to be there, though it ended soon."""
        try:
            await self._empty()
        except OSError as error:
            _log.warning("job '%s': its target could not be made: %s", self.id, error)
            return False
        return await self._copier.drain()

    def _end(self, *, succeeded: bool, unsaved: Bits | None) -> None:
        """Take the view out and unfreeze the bitmap, in one step."""
        self._remove_hooks()
        if self._frozen is not None:
            self._frozen.conclude(self._clusters, succeeded=succeeded, unsaved=unsaved)
            self._bitmap_knows_all = succeeded or self._frozen.forgets_after_failure

    def _hooks(self) -> list[BeforeWrite]:
        """In the order in which a guest's write passes them."""
        copier = self._copier
        return [copier.hook] if copier.discard is None else [copier.discard, copier.hook]

    def _remove_hooks(self) -> None:
        for hook in self._hooks():
            self._source.remove_hook(hook)

    async def _list_unsaved(self) -> Bits | None:
        if self._frozen is None:
            return None
        return await self._frozen.list_unsaved(self._clusters)

    async def _list_unsaved_after_failure(self) -> Bits | None:
        """What is not on the target durably; None where that is not known, or not asked for."""
        if self._frozen is None or not self._frozen.forgets_after_failure:
            return None
        try:
            await self._secure()
        except (OSError, JobError) as error:
            _log.warning("job '%s': nothing of it is of use: %s", self.id, error)
            return None
        return await self._list_unsaved()

    async def close(self) -> None:
        try:
            if self._record is not None:
                await self._record.end()
            if self._mark is not None and not self._touched:
                await self._mark.withdraw()
            elif self._mark is not None and self._bitmap_knows_all:
                await self._mark.leave_to_bitmap()
        finally:
            if self._release is not None:
                await self._release()
