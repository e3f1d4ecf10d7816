"""The table of all commands."""

from __future__ import annotations

from functools import cache
from typing import Any

from blockd.qmp.commands import (
    audit,
    backup,
    bitmap,
    block,
    create,
    export,
    job,
    meta,
    objects,
    reopen,
    snapshot,
    stats,
    transaction,
)
from blockd.qmp.dispatch import Command
from blockd.qmp.introspection import Entity, describe
from blockd.qmp.services import Services
from blockd.qmp.session import NEGOTIATION
from blockd.qmp.types import backup as backup_types
from blockd.qmp.types import bitmap as bitmap_types
from blockd.qmp.types import block as block_types
from blockd.qmp.types import blockdev as blockdev_types
from blockd.qmp.types import create as create_types
from blockd.qmp.types import event as event_types
from blockd.qmp.types import export as export_types
from blockd.qmp.types import job as job_types
from blockd.qmp.types import meta as meta_types
from blockd.qmp.types import objects as object_types
from blockd.qmp.types import snapshot as snapshot_types
from blockd.qmp.types import transaction as transaction_types


def _query_commands(
    _services: Services, _arguments: meta_types.QueryCommands
) -> list[dict[str, str]]:
    return [{"name": name} for name in (NEGOTIATION, *(command.name for command in COMMANDS))]


def _query_qmp_schema(_services: Services, _arguments: meta_types.QueryQmpSchema) -> list[Entity]:
    return schema()


COMMANDS = [
    Command.of(meta_types.QueryCommands, _query_commands),
    Command.of(meta_types.QueryQmpSchema, _query_qmp_schema),
    Command.of(meta_types.QueryVersion, meta.query_version),
    Command.of(meta_types.Quit, meta.quit_daemon, concurrent=True),
    Command("object-add", object_types.ObjectAddOptions, objects.object_add),
    Command.of(object_types.ObjectDel, objects.object_del),
    Command("blockdev-add", blockdev_types.BlockdevOptions, block.blockdev_add),
    Command.of(block_types.BlockdevDel, block.blockdev_del),
    Command.of(block_types.BlockdevReopen, reopen.blockdev_reopen),
    Command.of(create_types.BlockdevCreate, create.blockdev_create),
    Command.of(block_types.BlockResize, block.block_resize),
    Command.of(snapshot_types.BlockdevSnapshot, snapshot.blockdev_snapshot),
    Command.of(snapshot_types.BlockdevSnapshotSync, snapshot.blockdev_snapshot_sync),
    Command.of(block_types.BlockSetWriteThreshold, block.block_set_write_threshold),
    Command.of(block_types.QueryBlock, block.query_block),
    Command.of(block_types.QueryBlockstats, stats.query_blockstats),
    Command.of(block_types.QueryNamedBlockNodes, block.query_named_block_nodes, concurrent=True),
    Command.of(bitmap_types.BlockDirtyBitmapAdd, bitmap.add),
    Command.of(bitmap_types.BlockDirtyBitmapRemove, bitmap.remove),
    Command.of(bitmap_types.BlockDirtyBitmapClear, bitmap.clear),
    Command.of(bitmap_types.BlockDirtyBitmapEnable, bitmap.enable),
    Command.of(bitmap_types.BlockDirtyBitmapDisable, bitmap.disable),
    Command.of(bitmap_types.BlockDirtyBitmapMerge, bitmap.merge),
    Command.of(bitmap_types.XBlockdAudit, audit.audit),
    Command.of(bitmap_types.XDebugBlockDirtyBitmapSha256, bitmap.sha256, concurrent=True),
    Command.of(export_types.NbdServerStart, export.nbd_server_start),
    Command.of(export_types.NbdServerStop, export.nbd_server_stop, concurrent=True),
    Command.of(export_types.NbdServerAdd, export.nbd_server_add),
    Command.of(export_types.NbdServerRemove, export.nbd_server_remove, concurrent=True),
    Command("block-export-add", export_types.NbdExport, export.block_export_add),
    Command.of(export_types.BlockExportDel, export.block_export_del, concurrent=True),
    Command.of(export_types.QueryBlockExports, export.query_block_exports),
    Command.of(backup_types.DriveBackup, backup.drive_backup),
    Command.of(backup_types.BlockdevBackup, backup.blockdev_backup),
    Command.of(transaction_types.Transaction, transaction.transaction),
    Command.of(job_types.JobPause, job.pause),
    Command.of(job_types.JobResume, job.resume),
    Command.of(job_types.JobCancel, job.cancel, concurrent=True),
    Command.of(job_types.JobComplete, job.complete),
    Command.of(job_types.JobFinalize, job.finalize, concurrent=True),
    Command.of(job_types.JobDismiss, job.dismiss),
    Command.of(job_types.QueryJobs, job.query_jobs),
    Command.of(job_types.BlockJobPause, job.block_pause),
    Command.of(job_types.BlockJobResume, job.block_resume),
    Command.of(job_types.BlockJobCancel, job.block_cancel, concurrent=True),
    Command.of(job_types.BlockJobComplete, job.block_complete),
    Command.of(job_types.BlockJobFinalize, job.block_finalize, concurrent=True),
    Command.of(job_types.BlockJobDismiss, job.block_dismiss),
    Command.of(job_types.BlockJobSetSpeed, job.block_set_speed),
    Command("block-job-change", job_types.BlockJobChangeOptions, job.block_change),
    Command.of(job_types.QueryBlockJobs, job.query_block_jobs),
]


@cache
def schema() -> list[Entity]:
    """What ``query-qmp-schema`` answers."""
    declarations: dict[str, Any] = {command.name: command.declaration for command in COMMANDS}
    declarations[NEGOTIATION] = meta_types.QmpCapabilities
    return describe(declarations, event_types.EVENTS)
