"""Whether a backup of one node to another can be made."""

from __future__ import annotations

from collections.abc import Callable

from blockd.backup.plan import BackupPlan, BackupRequest, choose_bitmap
from blockd.block import Node, Role
from blockd.errors import BlockdError


def plan_backup(
    request: BackupRequest,
    source: Node,
    target: Node,
    *,
    check_filter_name: Callable[[], None] | None = None,
) -> BackupPlan:
    """The plan for a request, or the ``BlockdError`` with which it is refused.

    Clients see the first mistake of several, so the order is QEMU's. ``check_filter_name`` raises
    where the filter node that the user named can't be made.
    """
    used = choose_bitmap(request, source.bitmaps)
    check_not_same(source, target)
    if request.compress and not target.driver.compresses:
        # QEMU names a device here, which none is.
        raise BlockdError("Compression is not supported for this drive ")
    for node in (source, target):
        node.users.check_not_busy(Role.TARGET)
    performance = request.performance
    performance.check_bounds()
    if source.size_bytes != target.size_bytes:
        raise BlockdError("Source and target image have different sizes")
    performance.check_cluster_fits()
    _check_filter(target, check_filter_name)
    cluster_bytes = performance.cluster_bytes(target.driver.cluster_size_bytes)
    chunk_clusters = -(-performance.max_chunk_bytes // cluster_bytes)
    return BackupPlan(
        request.sync,
        used,
        cluster_bytes=cluster_bytes,
        max_workers=performance.max_workers,
        max_chunk_bytes=chunk_clusters * cluster_bytes or None,
        discard_source=request.discard_source,
        compress=request.compress,
    )


def check_not_same(source: Node, target: Node) -> None:
    """Raise ``BlockdError`` where both are one node, or two over the same file."""
    if source is target:
        raise BlockdError("Source and target cannot be the same")
    storage = source.driver.identity
    if storage is not None and storage == target.driver.identity:
        raise BlockdError("Source and target cannot be the same: both stand on one file")


def _check_filter(target: Node, check_name: Callable[[], None] | None) -> None:
    try:
        if check_name is not None:
            check_name()
        if target.read_only:
            raise BlockdError("Block node is read-only")
    except BlockdError as error:
        raise BlockdError(f"Could not create node: {error.message}") from None
