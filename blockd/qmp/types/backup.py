"""Backups."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Command, Int64, Object, UInt64

OnErrorName = Literal["report", "ignore", "enospc", "stop", "auto"]


class BackupPerf(Object, kw_only=True):
    """How a backup copies in the background.

    ``max-workers``: copies at once, at the most; more than 4 are never made. ``max-chunk``: bytes
    of one copy at the most, rounded up to whole clusters; 0 for no bound. ``min-cluster-size``:
    bytes that are copied together at the least, also before a guest overwrites any of them: a power
    of two, at most 16 MiB; below 64 KiB and the target's cluster size it has no effect.
    ``use-copy-range``: a hint, which changes nothing here.
    """

    use_copy_range: bool = False
    max_workers: Int64 = 64
    max_chunk: Int64 = 0
    min_cluster_size: UInt64 = 0


class Backup(Command, kw_only=True):
    """What both backup commands take.

    ``job-id``: what job commands and events call it. ``device``: the source's node name. ``sync``:
    ``full`` copies the disk, ``top`` what its topmost image holds (of one without a backing file:
    everything), ``incremental`` and ``bitmap`` what ``bitmap`` names. ``none`` copies nothing but
    what guests are about to overwrite, and runs until it is cancelled; the target then has all old
    data that was kept, and nothing else of the disk.
    ``bitmap-mode``: when the bitmap forgets what was copied: ``on-success`` of the whole backup,
    ``always`` (what was copied before a failure too), ``never``. ``speed``: bytes per second, 0 for
    no limit. ``on-source-error``, ``on-target-error``: fail (``report``), go on without the block,
    which stays dirty (``ignore``), pause (``stop``), or pause only where the target is full
    (``enospc``, ``auto``). ``compress``: store clusters compressed, which a qcow2 target can.
    ``filter-node-name``: the name under which the queries list what keeps old data while the job
    runs; no command takes it as a node. ``discard-source``: discard on the source what was copied,
    once the target has it durably; not what guests have written meanwhile. ``auto-finalize`` false:
    a successful job waits for ``job-finalize``. ``auto-dismiss`` false: an ended job is listed
    until ``job-dismiss``.
    """

    command: ClassVar[str] = ""

    job_id: str = ""
    device: str
    sync: Literal["top", "full", "incremental", "none", "bitmap"]
    speed: Int64 = 0
    bitmap: str | None = None
    bitmap_mode: Literal["on-success", "always", "never"] | None = None
    compress: bool = False
    on_source_error: OnErrorName = "report"
    on_target_error: OnErrorName = "report"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    discard_source: bool = False
    x_perf: BackupPerf | None = None


class DriveBackup(Backup, kw_only=True):
    """Back a node up to a file while guests write on; answers when the backup has begun.

    ``target``: the file. ``mode``: ``absolute-paths`` makes it (or empties it), ``existing``
    takes it as it is, with what earlier backups put there. ``format``: the target's, raw or qcow2;
    by default the source's, or what an existing target looks like. With ``sync`` top and none the
    target has a backing file, which only qcow2 has: what is below the source, or the source.
    """

    command: ClassVar[str] = "drive-backup"

    target: str
    format: str | None = None
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"


class BlockdevBackup(Backup, kw_only=True):
    """As drive-backup, to the node ``target``."""

    command: ClassVar[str] = "blockdev-backup"

    target: str
