"""Backups of a live node: what to copy, the view of the instant, the copying, and the end."""

from blockd.backup.backup_job import BackupJob, plan_backup
from blockd.backup.copier import OnErrors
from blockd.backup.plan import BackupPlan, BackupRequest, BitmapMode, Sync, choose_bitmap

__all__ = [
    "BackupJob",
    "BackupPlan",
    "BackupRequest",
    "BitmapMode",
    "OnErrors",
    "Sync",
    "choose_bitmap",
    "plan_backup",
]
