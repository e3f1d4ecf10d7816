"""What a backup is asked to do, whether that makes sense, and what becomes of its bitmap."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap, Freeze, NodeBitmaps
from blockd.errors import BlockdError


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
class BackupRequest:
    """What the user asked for; ``bitmap`` is a name."""

    sync: Sync
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None


@dataclass(frozen=True, slots=True)
class UsedBitmap:
    """The bitmap that a backup freezes, and when it may forget."""

    bitmap: DirtyBitmap
    mode: BitmapMode


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """A request that makes sense. Without ``used`` the backup touches no bitmap."""

    sync: Sync
    used: UsedBitmap | None


class Disk(Protocol):
    """What the checks ask of a node."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def bitmaps(self) -> NodeBitmaps: ...


def resolve(
    request: BackupRequest,
    source: Disk,
    target: Disk,
    *,
    source_blocker: str | None = None,
    target_blocker: str | None = None,
) -> BackupPlan:
    """The plan for a request, or the ``BlockdError`` with which it is refused.

    The checks are those of specification section 4, in its order; both nodes exist. A blocker
    says who forbids a backup of this node, as in ``block device is in use by block job: backup``.
    """
    used = choose_bitmap(request, source.bitmaps)
    if source is target:
        raise BlockdError("Source and target cannot be the same")
    for disk, blocker in ((source, source_blocker), (target, target_blocker)):
        if blocker is not None:
            raise BlockdError(f"Node '{disk.name}' is busy: {blocker}")
    if source.size_bytes != target.size_bytes:
        raise BlockdError("Source and target image have different sizes")
    if target.read_only:
        raise BlockdError("Could not create node: Block node is read-only")
    return BackupPlan(request.sync, used)


def choose_bitmap(request: BackupRequest, bitmaps: NodeBitmaps) -> UsedBitmap | None:
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
    bitmap.check_usable()
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


def copy_cluster_bytes(target_cluster_bytes: int | None) -> int:
    """The unit in which a backup copies, for a target with such clusters."""
    return max(limits.BACKUP_CLUSTER_BYTES, target_cluster_bytes or 0)


def conclude_bitmap(freeze: Freeze, mode: BitmapMode, *, succeeded: bool, rest: Bits) -> None:
    """End the freeze, for good: the table of specification section 4, in one step.

    ``rest`` is what the job had still to copy, or could not copy: every cluster of which it is
    not certain that it is on the target, durably. It is given away with the call.
    """
    match mode:
        case BitmapMode.ON_SUCCESS if succeeded:
            freeze.abdicate(rest)
        case BitmapMode.ALWAYS:
            freeze.abdicate(rest)
        case BitmapMode.ON_SUCCESS | BitmapMode.NEVER:
            freeze.reclaim()
