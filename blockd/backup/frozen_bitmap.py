"""The bitmap of a running backup: what it asks to be copied, and how it ends."""

from __future__ import annotations

import trio

from blockd.backup.clusters import Clusters, runs_of
from blockd.backup.plan import BitmapMode, Sync, UsedBitmap, conclude_bitmap
from blockd.bitmap import Bits


class FrozenBitmap:
    """A bitmap from its freeze, which happens here, to its one end by ``conclude``."""

    def __init__(self, used: UsedBitmap, sync: Sync, job_id: str) -> None:
        """Raises ``BlockdError`` where the bitmap is in use."""
        self.bitmap = used.bitmap
        self._mode = used.mode
        self._sync = sync
        self._freeze = used.bitmap.freeze(job_id)
        self._concluded = False

    @property
    def wanted(self) -> Bits | None:
        """What is to be copied; None: everything."""
        return self._freeze.snapshot if self._sync.by_bitmap else None

    @property
    def forgets_after_failure(self) -> bool:
        """Whether the bitmap, after a failure, keeps only what was not copied."""
        return self._mode is BitmapMode.ALWAYS

    def revoke(self) -> None:
        """Take the freeze back at the instant at which it was made; ``conclude`` is not due."""
        self._concluded = True
        self._freeze.reclaim()

    async def list_unsaved(self, clusters: Clusters) -> Bits:
        """What is not on the target of all that was to be copied; ask when copying has ended."""
        rest = self._freeze.snapshot.empty_copy()
        if clusters.finished.is_set() and not clusters.skipped:
            return rest
        for runs in clusters.unsaved_runs():
            for first, end in runs:
                rest.mark(first << clusters.shift, clusters.length(first, end))
            await trio.lowlevel.checkpoint()
        return rest

    def conclude(self, clusters: Clusters, *, succeeded: bool, unsaved: Bits | None) -> None:
        """Unfreeze the bitmap; ``unsaved`` None: that may be everything. Later calls do nothing."""
        if self._concluded:
            return
        self._concluded = True
        rest = self._everything() if unsaved is None else unsaved
        torn = self._list_torn(clusters)
        conclude_bitmap(self._freeze, self._mode, succeeded=succeeded, rest=rest, torn=torn)

    def _list_torn(self, clusters: Clusters) -> Bits | None:
        if not clusters.torn or not self._sync.by_bitmap:
            # What a full backup that failed left on its target, no bitmap says anyway.
            return None
        torn = self._freeze.snapshot.empty_copy()
        for first, end in runs_of(clusters.torn):
            torn.mark(first << clusters.shift, clusters.length(first, end))
        return torn

    def _everything(self) -> Bits:
        if self._sync.by_bitmap:
            return self._freeze.snapshot
        bits = self._freeze.snapshot.empty_copy()
        bits.mark_all()
        return bits
