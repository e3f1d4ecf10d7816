"""The options of each driver: what ``blockdev-add`` takes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from blockd.qmp.types.address import InetData, UnixData, VsockData
from blockd.qmp.types.base import Int64, Object, UInt32, UInt64
from blockd.qmp.types.bitmap import BitmapOfNode


class CacheOptions(Object, kw_only=True):
    """``direct``: I/O passes the page cache by. ``no-flush``: flushes do nothing (data at risk)."""

    direct: bool | None = None
    no_flush: bool | None = None


class NodeOptions(Object, kw_only=True):
    """Make a node: the arguments of ``blockdev-add``, and of a node made along with another.

    ``node-name``: what other commands call it; at most 31 letters, digits, ``-``, ``.``, ``_``,
    a letter first. ``discard``: whether discarded blocks are given back to the storage.
    ``auto-read-only``: fall back to read-only where the image can't be opened for writing.
    A node that is made along with another takes what it does not say itself from that one.
    """

    node_name: str | None = None
    discard: Literal["ignore", "unmap"] | None = None
    cache: CacheOptions | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None


class FileOptions(NodeOptions, tag_field="driver", tag="file", kw_only=True):
    """A regular file."""

    filename: str


class HostDeviceOptions(NodeOptions, tag_field="driver", tag="host_device", kw_only=True):
    """A block device of the host."""

    filename: str


class RawOptions(NodeOptions, tag_field="driver", tag="raw", kw_only=True):
    """An image without a format. ``offset``, ``size``: in bytes, the part of ``file`` it is."""

    file: BlockdevRef
    offset: Int64 | None = None
    size: Int64 | None = None


Qcow2OverlapCheckMode = Literal["none", "constant", "cached", "all"]


class Qcow2OverlapCheckFlags(Object, kw_only=True):
    """Which of an image's tables are looked after, besides those of ``template``."""

    template: Qcow2OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


Qcow2OverlapChecks = Annotated[
    Qcow2OverlapCheckMode | Qcow2OverlapCheckFlags, Meta(title="Qcow2OverlapChecks")
]


class Qcow2Options(NodeOptions, tag_field="driver", tag="qcow2", kw_only=True):
    """An image that takes only the room of what was written to it.

    ``backing``: what is read where the image holds nothing; null: zeroes; not given: what the
    image names. ``data-file``: where the image keeps its data apart; not given: the file that it
    names. ``lazy-refcounts``: accepted; refcounts are written in time all the same.
    ``pass-discard-request``, ``pass-discard-other``: whether clusters that become free are
    discarded in ``file``: after a discard (by default where ``discard`` says so), and after
    anything else. Here the second goes by the first. ``overlap-check``: accepted; writes to the
    image's own tables are always refused.
    """

    file: BlockdevRef
    backing: BlockdevRefOrNull | UnsetType = UNSET
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    overlap_check: Qcow2OverlapChecks | None = None
    data_file: BlockdevRef | None = None


class NullOptions(NodeOptions, tag_field="driver", tag="null-co", kw_only=True):
    """No storage: reads as zeroes, forgets what is written. For measuring.

    ``size``: in bytes, 1 GiB by default. ``latency-ns``: how long each request takes.
    ``read-zeroes``: whether to say that it reads as zeroes.
    """

    size: Int64 | None = None
    latency_ns: UInt64 = 0
    read_zeroes: bool = False


class ThrottleOptions(NodeOptions, tag_field="driver", tag="throttle", kw_only=True):
    """``file``, no faster than the object ``throttle-group`` allows to all of its nodes."""

    throttle_group: str
    file: BlockdevRef


class CopyOnReadOptions(NodeOptions, tag_field="driver", tag="copy-on-read", kw_only=True):
    """Keep in ``file`` what is read from its backing files, down to the node ``bottom``."""

    file: BlockdevRef
    bottom: str | None = None


class CopyBeforeWriteOptions(
    NodeOptions, tag_field="driver", tag="copy-before-write", kw_only=True
):
    """``file``; what is overwritten in it from now on is copied to ``target`` before.

    ``bitmap``: only what it names, as it is now. ``on-cbw-error``: where a copy fails, either the
    write of the guest fails, or there is no snapshot any more. ``cbw-timeout``: after so many
    seconds a copy has failed; 0 for never, but with ``break-snapshot`` the guest waits 10 seconds
    at most. ``min-cluster-size``: the least unit of copying, a power of two.
    """

    file: BlockdevRef
    target: BlockdevRef
    bitmap: BitmapOfNode | None = None
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    cbw_timeout: UInt32 = 0
    min_cluster_size: UInt64 = 0


class SnapshotAccessOptions(NodeOptions, tag_field="driver", tag="snapshot-access", kw_only=True):
    """The snapshot that ``file``, a copy-before-write filter, keeps.

    Reading fails where nothing was kept. With ``discard`` set to ``unmap``, what is discarded is
    no longer kept.
    """

    file: BlockdevRef


#: Where in QEMU's drivers something happens.
BlkdebugEvent = Literal[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
]
BlkdebugIoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]


class BlkdebugInjectErrorOptions(Object, kw_only=True):
    """From ``event`` on, if ``state`` was the state then, requests fail.

    ``iotype``: only such; by default all but block-status. ``sector``: only those that touch it.
    ``errno``: with this number, by default EIO. ``once``: only the first. ``immediately``:
    without giving others a turn before.
    """

    event: BlkdebugEvent
    state: Int64 | None = None
    iotype: BlkdebugIoType | None = None
    errno: Int64 | None = None
    sector: Int64 | None = None
    once: bool | None = None
    immediately: bool | None = None


class BlkdebugSetStateOptions(Object, kw_only=True):
    """``event`` changes the state to ``new_state``, if it was ``state``."""

    event: BlkdebugEvent
    state: Int64 | None = None
    new_state: Int64 = field(name="new_state")


class BlkdebugOptions(NodeOptions, tag_field="driver", tag="blkdebug", kw_only=True):
    """``image``, with errors on demand, for tests. The state is 1 at first."""

    image: BlockdevRef
    inject_error: list[BlkdebugInjectErrorOptions] | None = None
    set_state: list[BlkdebugSetStateOptions] | None = None


class ServerAddress(Object, kw_only=True):
    """Where a server is."""


class InetServerAddress(InetData, ServerAddress, tag_field="type", tag="inet", kw_only=True):
    """A TCP port by number or name."""


class UnixServerAddress(UnixData, ServerAddress, tag_field="type", tag="unix", kw_only=True):
    """A Unix socket."""


class VsockServerAddress(VsockData, ServerAddress, tag_field="type", tag="vsock", kw_only=True):
    """A port between a virtual machine and its host."""


class NbdOptions(NodeOptions, tag_field="driver", tag="nbd", kw_only=True):
    """An export of an NBD server.

    ``export``: its name, by default the empty one. ``open-timeout``: for so many seconds try to
    connect. ``reconnect-delay``: when the connection is lost, requests wait for so many seconds
    for it to come back, before they fail; was there anything that had been written and not flushed,
    the next flush of each client fails once, for the server may have lost it. ``tls-creds``: the
    credentials with which it is encrypted. ``tls-hostname``: the name in the server's certificate,
    by default its host.
    ``x-dirty-bitmap``: the meta context, say ``qemu:dirty-bitmap:NAME``, that is asked for in place
    of ``base:allocation``: what is set in it counts as not allocated.
    """

    server: InetServerAddress | UnixServerAddress | VsockServerAddress
    export: str = ""
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: str | None = None
    reconnect_delay: UInt32 = 0
    open_timeout: UInt32 = 0


#: The arguments of ``blockdev-add``: a variant for each driver.
BlockdevOptions = (
    RawOptions
    | FileOptions
    | HostDeviceOptions
    | Qcow2Options
    | NullOptions
    | NbdOptions
    | BlkdebugOptions
    | CopyBeforeWriteOptions
    | CopyOnReadOptions
    | SnapshotAccessOptions
    | ThrottleOptions
)
#: A node by name, or one to be made with the node that needs it.
BlockdevRef = Annotated[str | BlockdevOptions, Meta(title="BlockdevRef")]
#: The same, or null for none, where to leave it out means that the image says which.
BlockdevRefOrNull = Annotated[str | BlockdevOptions | None, Meta(title="BlockdevRefOrNull")]
