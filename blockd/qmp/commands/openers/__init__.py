"""The opener of each driver."""

from __future__ import annotations

from blockd.qmp.commands.openers.files import open_null, open_raw, open_storage
from blockd.qmp.commands.openers.filters import open_blkdebug, open_copy_on_read, open_throttle
from blockd.qmp.commands.openers.nbd import open_nbd
from blockd.qmp.commands.openers.qcow2 import open_qcow2
from blockd.qmp.commands.openers.snapshots import open_copy_before_write, open_snapshot_access
from blockd.qmp.opening import Openers
from blockd.qmp.types.blockdev import (
    BlkdebugOptions,
    CopyBeforeWriteOptions,
    CopyOnReadOptions,
    FileOptions,
    HostDeviceOptions,
    NbdOptions,
    NullOptions,
    Qcow2Options,
    RawOptions,
    SnapshotAccessOptions,
    ThrottleOptions,
)

OPENERS: Openers = {
    CopyBeforeWriteOptions: open_copy_before_write,
    SnapshotAccessOptions: open_snapshot_access,
    Qcow2Options: open_qcow2,
    NbdOptions: open_nbd,
    ThrottleOptions: open_throttle,
    NullOptions: open_null,
    BlkdebugOptions: open_blkdebug,
    CopyOnReadOptions: open_copy_on_read,
    FileOptions: open_storage,
    HostDeviceOptions: open_storage,
    RawOptions: open_raw,
}
