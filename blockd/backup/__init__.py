"""Backups of a live node: what to copy, the view of the instant, the copying, and the end."""

from blockd.backup.audit_job import AuditJob
from blockd.backup.backup_job import BackupJob
from blockd.backup.checks import check_not_same, plan_backup
from blockd.backup.copier import OnErrors
from blockd.backup.copy_before_write import (
    CopyBeforeWriteDriver,
    Keeping,
    SnapshotAccessDriver,
)
from blockd.backup.filter_node import FilterDriver
from blockd.backup.plan import (
    BackupPlan,
    BackupRequest,
    BitmapMode,
    Performance,
    Sync,
)

__all__ = [
    "AuditJob",
    "BackupJob",
    "BackupPlan",
    "BackupRequest",
    "BitmapMode",
    "CopyBeforeWriteDriver",
    "FilterDriver",
    "Keeping",
    "OnErrors",
    "Performance",
    "SnapshotAccessDriver",
    "Sync",
    "check_not_same",
    "plan_backup",
]
