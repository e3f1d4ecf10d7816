"""What a backup is asked to do, whether that makes sense, and what becomes of its bitmap."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap, Freeze, NodeBitmaps
from blockd.errors import BlockdError

#: QEMU counts them with 32 bits.
MAX_WORKERS = (1 << 31) - 1


class Sync(StrEnum):
    """What a backup copies: ``top`` what is in the disk's topmost image, ``none`` only what guests
    are about to overwrite.
    """

    FULL = "full"
    TOP = "top"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"

    @property
    def by_bitmap(self) -> bool:
        """Whether a bitmap says what is copied."""
        return self in (Sync.INCREMENTAL, Sync.BITMAP)


class BitmapMode(StrEnum):
    """When a backup's bitmap forgets what was copied."""

    ON_SUCCESS = "on-success"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Performance:
    """How the user bounds the copying. What a guest is about to overwrite is copied at once.

    ``max_workers``: how many copies the background has in flight. ``max_chunk_bytes``: how large
    each of them is at the most, 0 for no bound. ``min_cluster_bytes``: what the unit of all
    copying is at the least, a power of two; 0 asks for nothing.
    """

    max_workers: int = limits.BACKUP_WORKERS
    max_chunk_bytes: int = 0
    min_cluster_bytes: int = 0

    def check_bounds(self) -> None:
        """Raise ``BlockdError`` for what makes no sense for any target."""
        if not 1 <= self.max_workers <= MAX_WORKERS:
            raise BlockdError(f"max-workers must be between 1 and {MAX_WORKERS}")
        if self.max_chunk_bytes < 0:
            raise BlockdError("max-chunk must be zero (which means no limit) or positive")

    def check_cluster_fits(self) -> None:
        """Raise ``BlockdError`` where a cluster would take too much memory."""
        # QEMU takes more, tries to hold it in memory, and dies.
        if not self.min_cluster_bytes <= limits.BACKUP_CLUSTER_MAX_BYTES:
            raise BlockdError(
                f"min-cluster-size too large: {self.min_cluster_bytes} > "
                f"{limits.BACKUP_CLUSTER_MAX_BYTES}"
            )

    def check_power_of_two(self) -> None:
        """Raise ``BlockdError`` where no cluster can have the size asked for."""
        if self.min_cluster_bytes & (self.min_cluster_bytes - 1):
            raise BlockdError(
                "Cannot create block-copy-state: min-cluster-size needs to be a power of 2"
            )

    def cluster_bytes(self, target_cluster_bytes: int | None) -> int:
        """The unit of copying to a target with such clusters. Raises ``BlockdError``."""
        try:
            self.check_power_of_two()
        except BlockdError as error:
            raise BlockdError(f"Could not create node: {error.message}") from None
        cluster_bytes = max(
            limits.BACKUP_CLUSTER_BYTES, target_cluster_bytes or 0, self.min_cluster_bytes
        )
        if 0 < self.max_chunk_bytes < cluster_bytes:
            raise BlockdError(
                f"Required max-chunk ({self.max_chunk_bytes}) is less than "
                f"backup cluster size ({cluster_bytes})"
            )
        return cluster_bytes


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What the user asked for; ``bitmap`` is a name. ``compress``: write compressed clusters.

    ``discard_source``: give the source's space back for what was copied.
    """

    sync: Sync
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    compress: bool = False
    discard_source: bool = False
    performance: Performance = field(default_factory=Performance)


@dataclass(frozen=True, slots=True)
class UsedBitmap:
    """The bitmap that a backup freezes, and when it may forget."""

    bitmap: DirtyBitmap
    mode: BitmapMode


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """A request that makes sense. Without ``used`` the backup touches no bitmap.

    ``cluster_bytes``: the unit of copying. ``max_chunk_bytes``: the most that the background copies
    at once, whole clusters; None for no bound. ``compress``: the target takes compressed clusters.
    """

    sync: Sync
    used: UsedBitmap | None
    cluster_bytes: int
    max_workers: int
    max_chunk_bytes: int | None
    discard_source: bool
    compress: bool


def choose_bitmap(request: BackupRequest, bitmaps: NodeBitmaps) -> UsedBitmap | None:
    """The bitmap to be used, of those of the source; None: none. Raises ``BlockdError``."""
    sync, mode = request.sync, request.bitmap_mode
    if sync.by_bitmap and request.bitmap is None:
        raise BlockdError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync is Sync.INCREMENTAL:
        if mode not in (None, BitmapMode.ON_SUCCESS):
            raise BlockdError(
                f"Bitmap sync mode must be '{BitmapMode.ON_SUCCESS}' when using sync mode '{sync}'"
            )
        mode = BitmapMode.ON_SUCCESS
    if request.bitmap is None:
        if mode is not None:
            raise BlockdError("Cannot specify bitmap sync mode without a bitmap")
        return None
    bitmap = _find_bitmap(request.bitmap, bitmaps)
    if mode is None:
        raise BlockdError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check_usable(to_change=mode is not BitmapMode.NEVER)
    if sync is Sync.NONE:
        raise BlockdError(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if not sync.by_bitmap and mode is BitmapMode.NEVER:
        raise BlockdError(
            f"Bitmap sync mode '{mode}' has no meaningful effect "
            f"when combined with sync mode '{sync}'"
        )
    return UsedBitmap(bitmap, mode)


def _find_bitmap(name: str, bitmaps: NodeBitmaps) -> DirtyBitmap:
    try:
        return bitmaps.get(name)
    except BlockdError:
        # The bitmap commands say this in other words.
        raise BlockdError(f"Bitmap '{name}' could not be found") from None


def conclude_bitmap(
    freeze: Freeze, mode: BitmapMode, *, succeeded: bool, rest: Bits, torn: Bits | None
) -> None:
    """End the freeze, for good: in one step, as the bitmap's mode says.

    ``rest`` is what the job had still to copy, or could not copy: every cluster of which it is
    not certain that it is on the target, durably. ``torn`` is what it may have damaged there: a
    cluster has clean granules too, where granules are smaller. Both are given away with the call.
    """
    match mode:
        case BitmapMode.ON_SUCCESS if succeeded:
            freeze.abdicate(rest)
        case BitmapMode.ALWAYS:
            if torn is not None:
                torn.resize(rest.size_bytes)
                rest.merge(torn)
            freeze.abdicate(rest)
        case BitmapMode.ON_SUCCESS | BitmapMode.NEVER:
            freeze.reclaim(torn)
