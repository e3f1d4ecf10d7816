"""A backup as a job: what happens at its start, at its end, and when it fails."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from blockd.backup.clusters import Clusters
from blockd.backup.copier import Copier, OnErrors
from blockd.backup.frozen_bitmap import FrozenBitmap
from blockd.backup.incomplete import BitmapNeed, IncompleteMark
from blockd.backup.plan import BackupPlan, BackupRequest, Sync, copy_cluster_bytes, resolve
from blockd.bitmap import Bits
from blockd.block import Claim, Node, Role
from blockd.errors import BlockdError
from blockd.job import Job

log = logging.getLogger(__name__)


def plan_backup(request: BackupRequest, source: Node, target: Node) -> BackupPlan:
    """The plan for a request, or the ``BlockdError`` with which it is refused (section 4)."""
    storage = source.driver.identity
    if source is not target and storage is not None and storage == target.driver.identity:
        raise BlockdError("Source and target cannot be the same: both stand on one file")
    return resolve(
        request, source, target, source_blocker=_blocker(source), target_blocker=_blocker(target)
    )


def _blocker(node: Node) -> str | None:
    is_target = node.users.of(Role.TARGET)
    return "block device is in use by block job: backup" if is_target else None


class BackupJob(Job):
    """Copies what ``source`` holds at the job's start to ``target``, while guests write on.

    From its making the job holds both nodes; ``close`` lets go of them.
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
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """``plan`` is for these nodes. ``target_path`` is the target's, if it is a regular file.

        ``empty_target`` is awaited before the first byte is copied, once the mark is there.
        ``release`` is awaited at the very end, for a target that was opened for this job.
        Raises ``BlockdError`` where another user of a node forbids this one.
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
        self._mark = None if target_path is None else self._make_mark(target_path)
        self._frozen: FrozenBitmap | None = None
        self._clusters: Clusters
        self._copier: Copier
        #: After copying has ended well: what was left out.
        self._unsaved: Bits | None = None
        #: The bitmap was unfrozen with everything in it that is missing on the target.
        self._bitmap_knows_all = False
        self._claims = self._hold_nodes()

    def _make_mark(self, target_path: str) -> IncompleteMark:
        used = self._plan.used
        need = None if used is None else BitmapNeed.of(self._source.name, used.bitmap)
        return IncompleteMark(
            target_path,
            self.id,
            full=not self._plan.sync.by_bitmap,
            need=need,
            emptied=self._empty_target is not None,
        )

    def _hold_nodes(self) -> list[tuple[Node, Claim]]:
        user = f"block job '{self.id}'"
        source = self._source.users.claim(user, Role.SOURCE, writes=False)
        try:
            target = self._target.users.claim(user, Role.TARGET, writes=True)
        except BaseException:
            self._source.users.release(source)
            raise
        return [(self._source, source), (self._target, target)]

    # -- the start ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Freeze the bitmap and put the point-in-time view in, with no guest write in between."""
        async with self._source.quiesced():
            self._begin()

    def _begin(self) -> None:
        used = self._plan.used
        frozen = None if used is None else FrozenBitmap(used, self._plan.sync, self.id)
        try:
            self._clusters = Clusters(
                self._source.size_bytes,
                copy_cluster_bytes(self._target.driver.cluster_size_bytes),
                None if frozen is None else frozen.wanted,
            )
            self._copier = Copier(
                self,
                self._source,
                self._target,
                self._clusters,
                self._on_errors,
                background=self._plan.sync is not Sync.NONE,
            )
        except BaseException:
            if frozen is not None:
                frozen.conclude(succeeded=False, unsaved=None)
            raise
        self._frozen = frozen
        self._source.add_hook(self._copier.hook)
        self.set_total((self._clusters.count_at_once() or 0) << self._clusters.shift)

    async def run(self) -> None:
        try:
            if self._mark is not None:
                await self._mark.put()
            if self._empty_target is not None:
                await self._empty_target()
            await self._copier.run()
        finally:
            self._copier.hook.abandon()

    # -- the end -----------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the target durable, and say so."""
        await self._target.flush()
        self._unsaved = await self._list_unsaved()
        if self._clusters.skipped:
            nbytes = self._clusters.skipped << self._clusters.shift
            log.warning("job '%s' went without %d bytes that it could not copy", self.id, nbytes)
        elif self._mark is not None:
            await self._mark.satisfy()

    async def commit(self) -> None:
        async with self._source.quiesced():
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
                await self._copier.drain()
            unsaved = await self._list_unsaved_after_failure()
            async with self._source.quiesced():
                self._end(succeeded=False, unsaved=unsaved)
        finally:
            self._source.remove_hook(self._copier.hook)
            if self._frozen is not None:
                self._frozen.conclude(succeeded=False, unsaved=None)

    def _end(self, *, succeeded: bool, unsaved: Bits | None) -> None:
        """Take the view out and unfreeze the bitmap, in one step."""
        self._source.remove_hook(self._copier.hook)
        if self._frozen is not None:
            self._frozen.conclude(succeeded=succeeded, unsaved=unsaved)
            self._bitmap_knows_all = succeeded or self._frozen.forgets_after_failure

    async def _list_unsaved(self) -> Bits | None:
        if self._frozen is None:
            return None
        return await self._frozen.list_unsaved(self._clusters)

    async def _list_unsaved_after_failure(self) -> Bits | None:
        """What is not on the target durably; None where that is not known, or not asked for."""
        if self._frozen is None or not self._frozen.forgets_after_failure:
            return None
        try:
            await self._target.flush()
        except OSError as error:
            log.warning("job '%s': nothing of it is durable, flush failed: %s", self.id, error)
            return None
        return await self._list_unsaved()

    async def close(self) -> None:
        try:
            if self._mark is not None and self._bitmap_knows_all:
                await self._mark.leave_to_bitmap()
        finally:
            for node, claim in self._claims:
                node.users.release(claim)
            if self._release is not None:
                await self._release()
