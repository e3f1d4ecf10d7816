"""Events. Whoever has negotiated hears all that happens from then on."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Object
from blockd.qmp.types.block import BitmapReason
from blockd.qmp.types.job import JobStatus, JobType


class Event(Object, kw_only=True):
    """The data of the event ``event``; the docstring says when it is sent."""

    event: ClassVar[str]


class JobStatusChange(Event, kw_only=True):
    """A job's status is now ``status``."""

    event: ClassVar[str] = "JOB_STATUS_CHANGE"

    id: str
    status: JobStatus


class BlockJobPending(Event, kw_only=True):
    """A job with ``auto-finalize`` false has done its work, and waits for ``job-finalize``."""

    event: ClassVar[str] = "BLOCK_JOB_PENDING"

    type: JobType
    id: str


class BlockJobError(Event, kw_only=True):
    """Reading the source or writing the target failed; ``action`` is what the job does about it.

    With ``stop`` it is paused until it is resumed.
    """

    event: ClassVar[str] = "BLOCK_JOB_ERROR"

    device: str
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]


class BlockJobEnd(Event, kw_only=True):
    """How a job ended.

    ``device``: its id. ``offset`` of ``len`` bytes were done. ``speed``: its limit, in bytes per
    second, 0 for none.
    """

    event: ClassVar[str] = ""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


class BlockJobCompleted(BlockJobEnd, kw_only=True):
    """A job ended by itself: well, or with ``error``."""

    event: ClassVar[str] = "BLOCK_JOB_COMPLETED"

    error: str | None = None


class BlockJobCancelled(BlockJobEnd, kw_only=True):
    """A job was cancelled."""

    event: ClassVar[str] = "BLOCK_JOB_CANCELLED"


class BlockExportDeleted(Event, kw_only=True):
    """An export is gone, with its last client."""

    event: ClassVar[str] = "BLOCK_EXPORT_DELETED"

    id: str


class BlockWriteThreshold(Event, kw_only=True):
    """A write to a node ends past the threshold that was set for it, by ``amount-exceeded`` bytes.

    Sent before the write; the threshold is gone then, so there is one event for each.
    """

    event: ClassVar[str] = "BLOCK_WRITE_THRESHOLD"

    node_name: str
    amount_exceeded: int
    write_threshold: int


class BlockImageCorrupted(Event, kw_only=True):
    """The image of a node turned out to be damaged, as ``msg`` says; ``device`` is empty.

    ``fatal``: it is marked as corrupt, every I/O fails from now on, and it has to be repaired, as
    by ``qemu-img check -r all``. Otherwise it is read only, or the damage is where it is alone;
    more of that kind is not told of.
    """

    event: ClassVar[str] = "BLOCK_IMAGE_CORRUPTED"

    device: str
    node_name: str | None = None
    msg: str
    fatal: bool


class BlockDirtyBitmapRecovered(Event, kw_only=True):
    """A bitmap that was kept came back other than it was, because of ``reason``; or it was found
    out, by an audit or when a node is writable again, that others have changed the image.

    Everything is dirty in it, or it is ``inconsistent`` and can only be removed.
    """

    event: ClassVar[str] = "BLOCK_DIRTY_BITMAP_RECOVERED"

    node_name: str
    name: str
    reason: BitmapReason
    inconsistent: bool


class BlockDirtyBitmapsUnsafe(Event, kw_only=True):
    """The state directory can't be written to, as ``error`` says.

    Guests go on, and the node's bitmaps are right for as long as blockd runs. After a crash the
    persistent ones would come back all dirty.
    """

    event: ClassVar[str] = "BLOCK_DIRTY_BITMAPS_UNSAFE"

    node_name: str
    error: str


class BlockDirtyBitmapsSafe(Event, kw_only=True):
    """What BLOCK_DIRTY_BITMAPS_UNSAFE told is over."""

    event: ClassVar[str] = "BLOCK_DIRTY_BITMAPS_SAFE"

    node_name: str


EVENTS: list[type[Event]] = [
    JobStatusChange,
    BlockJobPending,
    BlockJobError,
    BlockJobCompleted,
    BlockJobCancelled,
    BlockExportDeleted,
    BlockWriteThreshold,
    BlockImageCorrupted,
    BlockDirtyBitmapRecovered,
    BlockDirtyBitmapsUnsafe,
    BlockDirtyBitmapsSafe,
]
