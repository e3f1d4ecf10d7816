"""Nodes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from msgspec import field

from blockd.qmp.types.base import Command, Int64, Object, Query, UInt64
from blockd.qmp.types.blockdev import BlockdevOptions


class BlockdevDel(Command, kw_only=True):
    """Flush and close a node that nobody uses, and what was made with it."""

    command: ClassVar[str] = "blockdev-del"

    node_name: str


class BlockResize(Command, kw_only=True):
    """Change a node's size, and its bitmaps'; what is added reads as zeroes.

    ``size``: in bytes. Refused while an export or a job uses the node, for they rely on its size.
    ``device``: not of use here, as there are no devices.
    """

    command: ClassVar[str] = "block_resize"

    device: str | None = None
    node_name: str | None = None
    size: Int64


class BlockSetWriteThreshold(Command, kw_only=True):
    """Have BLOCK_WRITE_THRESHOLD sent at the next write to a node that ends past a byte.

    ``write-threshold``: that byte; 0 for no event. Once it was sent, it is 0 again.
    """

    command: ClassVar[str] = "block-set-write-threshold"

    node_name: str
    write_threshold: UInt64


class BlockdevReopen(Command, kw_only=True):
    """Give nodes other options: all of them at one instant, or none.

    Each is named by ``node-name`` and described as for ``blockdev-add``: what is not said has its
    default. ``read-only``, ``cache``, ``discard`` and ``auto-read-only`` may change, and of a raw
    node ``offset``, ``size`` and ``file``, to another node that is there. A node that was made
    along with another is described within that one. Bitmaps, exports and names stay; a qcow2
    image that becomes read-only has stored its bitmaps. Refused while a job uses a node, for
    another size while an export does, and for ``read-only`` while somebody writes.
    """

    command: ClassVar[str] = "blockdev-reopen"

    options: list[BlockdevOptions]


class FileSpecific(Object, kw_only=True):
    """Nothing that is known of a file only."""


class ImageSpecific(Object, kw_only=True):
    """What only images of one format have."""


class FileImageSpecific(ImageSpecific, tag_field="type", tag="file", kw_only=True):
    """A file."""

    data: FileSpecific


class Qcow2BitmapInfo(Object, kw_only=True):
    """A bitmap in the image. ``granularity``: in bytes.

    ``flags``: ``in-use`` by whoever has the image open, or had when that ended without order;
    ``auto``: it records.
    """

    name: str
    granularity: int
    flags: list[Literal["in-use", "auto"]]


class Qcow2Specific(Object, kw_only=True):
    """What the image's header says. ``compat``: 0.10 is version 2, 1.1 is version 3.

    ``bitmaps``: those that are in the image, which may be others than the node has by now.
    """

    compat: str
    compression_type: Literal["zlib", "zstd"]
    lazy_refcounts: bool | None = None
    refcount_bits: int
    data_file: str | None = None
    data_file_raw: bool | None = None
    corrupt: bool | None = None
    extended_l2: bool | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None


class Qcow2ImageSpecific(ImageSpecific, tag_field="type", tag="qcow2", kw_only=True):
    """A qcow2 image."""

    data: Qcow2Specific


class ImageInfo(Object, kw_only=True):
    """An image. ``virtual-size``: what guests see. ``actual-size``: what it takes of the storage.

    ``dirty-flag``: it was not closed in order. ``cluster-size``: what it is allocated by.
    ``backing-filename``, ``backing-filename-format``: as the image names its backing file;
    ``full-backing-filename``: where that is; ``backing-image``: that, unless the answer is flat.
    """

    filename: str
    format: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    backing_image: ImageInfo | None = None
    format_specific: FileImageSpecific | Qcow2ImageSpecific | None = None


class NodeCacheInfo(Object, kw_only=True):
    """The node's cache options; ``writeback`` is always true."""

    writeback: bool
    direct: bool
    no_flush: bool


BitmapReason = Literal["crash-unrecoverable", "image-changed", "size-changed", "state-damaged"]


class BlockDirtyInfo(Object, kw_only=True):
    """A dirty bitmap.

    ``name``: absent for one that a job has put in the place of a frozen one. ``count``: dirty
    bytes. ``granularity``: in bytes. ``busy``: a job has it, and no command may change it.
    ``persistent``: it outlives blockd. ``inconsistent``: nobody knows what is dirty; it can only be
    removed.

    ``reason``: why it is other than it was, until it is cleared, or a backup by it succeeds.
    ``image-changed``: the image was written to, or replaced, without blockd; or an audit found so.
    ``size-changed``: it was given another size, which the target then needs too.
    ``state-damaged``: what was kept of the bitmap is damaged, or could not be written. After these
    everything is dirty, and the next backup by it copies everything. ``crash-unrecoverable``: after
    a crash nobody knows what is dirty, so it is inconsistent, as where a qcow2 image alone kept it;
    remove it, and do a full backup.
    """

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None
    reason: BitmapReason | None = None


class BlockDeviceInfo(Object, kw_only=True):
    """A node. ``file``: its storage. ``ro``: read-only. ``drv``: its driver.

    ``backing_file``: its backing file, and ``backing_file_depth`` how many there are below.
    ``write_threshold``: as ``block-set-write-threshold`` set it, 0 once it was exceeded.
    Nodes have no throttling or encryption, and zeroes are not looked for in what is written: these
    members always say so.
    """

    file: str
    backing_file: str | None = field(name="backing_file", default=None)
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file_depth: int = field(name="backing_file_depth")
    active: bool
    encrypted: bool
    detect_zeroes: Literal["off"] = field(name="detect_zeroes")
    bps: int
    bps_rd: int = field(name="bps_rd")
    bps_wr: int = field(name="bps_wr")
    iops: int
    iops_rd: int = field(name="iops_rd")
    iops_wr: int = field(name="iops_wr")
    image: ImageInfo
    cache: NodeCacheInfo
    write_threshold: int = field(name="write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] | None = None


class QueryNamedBlockNodes(Query, kw_only=True):
    """All nodes, newest first. ``flat``: without the chain of backing files below each."""

    command: ClassVar[str] = "query-named-block-nodes"
    returns: ClassVar[Any] = list[BlockDeviceInfo]

    flat: bool = False


class BlockInfo(Object, kw_only=True):
    """A device of a virtual machine: there is none."""

    device: str
    type: str
    removable: bool
    locked: bool


class QueryBlock(Query, kw_only=True):
    """The devices of a virtual machine: there is none, so the answer is ``[]``."""

    command: ClassVar[str] = "query-block"
    returns: ClassVar[Any] = list[BlockInfo]


class IntervalStats(Object, kw_only=True):
    """Figures of one interval: none are kept."""


class DeviceStats(Object, kw_only=True, rename={}):
    """What a node was asked for since it was made, by exports, jobs and nodes above.

    ``_bytes``, ``_operations`` and ``_total_time_ns`` are those that succeeded, writes of zeroes
    among the writes; a request that is carried out in pieces counts once for each. ``failed``:
    by the storage. ``invalid``: refused for what it asked. ``wr_highest_offset``: the highest end
    of a write. What a backup copies without asking nodes counts only there. Nothing is merged,
    nor appended to zones.
    """

    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[IntervalStats]


class DriverStats(Object, kw_only=True):
    """What only nodes of one driver count: discards that reached the storage, or failed there."""

    discard_nb_ok: int
    discard_nb_failed: int
    discard_bytes_ok: int


class FileStats(DriverStats, tag_field="driver", tag="file", kw_only=True):
    """A file."""


class HostDeviceStats(DriverStats, tag_field="driver", tag="host_device", kw_only=True):
    """A block device of the host."""


class BlockStats(Object, kw_only=True):
    """A node's figures. ``parent``: those of the node below."""

    node_name: str | None = None
    stats: DeviceStats
    driver_specific: FileStats | HostDeviceStats | None = None
    parent: BlockStats | None = None


class QueryBlockstats(Query, kw_only=True):
    """Figures of all nodes, oldest first, with ``query-nodes``; else of devices: there are none."""

    command: ClassVar[str] = "query-blockstats"
    returns: ClassVar[Any] = list[BlockStats]

    query_nodes: bool = False
