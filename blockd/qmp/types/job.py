"""Jobs. ``block-job-*`` is the older form of ``job-*``; its ``device`` is the job's id."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from blockd.qmp.types.base import Command, Int64, Object, Query

#: The protocol's kinds, so that a client's own list is the same for both, and one of ours.
JobType = Literal[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
    "x-blockd-audit",
]
JobStatus = Literal[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]


class OfJob(Command, kw_only=True):
    """A command to a job."""

    command: ClassVar[str] = ""

    id: str


class JobPause(OfJob, kw_only=True):
    """Stop copying; guest writes still save what they overwrite."""

    command: ClassVar[str] = "job-pause"


class JobResume(OfJob, kw_only=True):
    """Go on after a pause or after an error that stopped the job."""

    command: ClassVar[str] = "job-resume"


class JobCancel(OfJob, kw_only=True):
    """End a job without its result: its bitmap is reclaimed."""

    command: ClassVar[str] = "job-cancel"


class JobComplete(OfJob, kw_only=True):
    """End the ``ready`` phase; backups have none."""

    command: ClassVar[str] = "job-complete"


class JobFinalize(OfJob, kw_only=True):
    """Let a pending job end; answers when it has."""

    command: ClassVar[str] = "job-finalize"


class JobDismiss(OfJob, kw_only=True):
    """Forget a concluded job."""

    command: ClassVar[str] = "job-dismiss"


class OfBlockJob(Command, kw_only=True):
    """A command in the older form."""

    command: ClassVar[str] = ""

    device: str


class BlockJobPause(OfBlockJob, kw_only=True):
    """As ``job-pause``."""

    command: ClassVar[str] = "block-job-pause"


class BlockJobResume(OfBlockJob, kw_only=True):
    """As ``job-resume``."""

    command: ClassVar[str] = "block-job-resume"


class BlockJobCancel(OfBlockJob, kw_only=True):
    """As ``job-cancel``; a paused job only with ``force``."""

    command: ClassVar[str] = "block-job-cancel"

    force: bool = False


class BlockJobComplete(OfBlockJob, kw_only=True):
    """As ``job-complete``."""

    command: ClassVar[str] = "block-job-complete"


class BlockJobFinalize(Command, kw_only=True):
    """As ``job-finalize``."""

    command: ClassVar[str] = "block-job-finalize"

    id: str


class BlockJobDismiss(Command, kw_only=True):
    """As ``job-dismiss``."""

    command: ClassVar[str] = "block-job-dismiss"

    id: str


class BlockJobSetSpeed(OfBlockJob, kw_only=True):
    """Limit a job's copying to ``speed`` bytes per second, 0 for no limit."""

    command: ClassVar[str] = "block-job-set-speed"

    speed: Int64


class ChangeOptions(Object, kw_only=True):
    """The arguments of ``block-job-change``: the job, and the type that it is said to have."""

    before_tag: ClassVar[tuple[str, ...]] = ("id",)

    id: str


class ChangeMirror(ChangeOptions, tag_field="type", tag="mirror", kw_only=True):
    """Change how a mirror copies; there is no such job here."""

    copy_mode: Literal["background", "write-blocking"]


class ChangeAmend(ChangeOptions, tag_field="type", tag="amend", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeBackup(ChangeOptions, tag_field="type", tag="backup", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeCommit(ChangeOptions, tag_field="type", tag="commit", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeCreate(ChangeOptions, tag_field="type", tag="create", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeSnapshotLoad(ChangeOptions, tag_field="type", tag="snapshot-load", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeSnapshotSave(ChangeOptions, tag_field="type", tag="snapshot-save", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeSnapshotDelete(ChangeOptions, tag_field="type", tag="snapshot-delete", kw_only=True):
    """A job of this type has nothing to be changed."""


class ChangeStream(ChangeOptions, tag_field="type", tag="stream", kw_only=True):
    """A job of this type has nothing to be changed."""


#: What a job is to become. Every job here is a backup, which can't be changed, so that is always
#: refused; but a client is told so only after its arguments were looked at.
BlockJobChangeOptions = (
    ChangeMirror
    | ChangeAmend
    | ChangeBackup
    | ChangeCommit
    | ChangeCreate
    | ChangeSnapshotLoad
    | ChangeSnapshotSave
    | ChangeSnapshotDelete
    | ChangeStream
)


class JobInfo(Object, kw_only=True):
    """A job. ``total-progress`` is an estimate. ``error``: why it failed."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


class QueryJobs(Query, kw_only=True):
    """All jobs, newest first."""

    command: ClassVar[str] = "query-jobs"
    returns: ClassVar[Any] = list[JobInfo]


class BlockJobInfo(Object, kw_only=True):
    """A job in the older form: ``device`` is its id, ``offset`` of ``len`` bytes are done.

    ``busy``: it is at work. ``speed``: its limit, in bytes per second. ``io-status``: the kind of
    error that it stopped at. ``ready``: it could be completed. ``error``: why it failed.
    """

    type: JobType
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: Literal["ok", "failed", "nospace"]
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None


class QueryBlockJobs(Query, kw_only=True):
    """All jobs, newest first, in the older form."""

    command: ClassVar[str] = "query-block-jobs"
    returns: ClassVar[Any] = list[BlockJobInfo]
