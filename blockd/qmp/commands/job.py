"""job-* and block-job-*."""

from __future__ import annotations

from typing import Any

from blockd.errors import BlockdError
from blockd.job import Status
from blockd.qmp.services import Services
from blockd.qmp.types.job import (
    BlockJobCancel,
    BlockJobChangeOptions,
    BlockJobDismiss,
    BlockJobFinalize,
    BlockJobSetSpeed,
    OfBlockJob,
    OfJob,
    QueryBlockJobs,
    QueryJobs,
)


def pause(services: Services, arguments: OfJob) -> None:
    services.jobs.get(arguments.id).pause()


def resume(services: Services, arguments: OfJob) -> None:
    services.jobs.get(arguments.id).resume()


async def cancel(services: Services, arguments: OfJob) -> None:
    await services.jobs.get(arguments.id).cancel()


def complete(services: Services, arguments: OfJob) -> None:
    services.jobs.get(arguments.id).complete()


async def finalize(services: Services, arguments: OfJob) -> None:
    await services.jobs.get(arguments.id).finalize()


def dismiss(services: Services, arguments: OfJob) -> None:
    services.jobs.get(arguments.id).dismiss()


def block_pause(services: Services, arguments: OfBlockJob) -> None:
    services.jobs.get_legacy(arguments.device).pause()


def block_resume(services: Services, arguments: OfBlockJob) -> None:
    services.jobs.get_legacy(arguments.device).resume()


async def block_cancel(services: Services, arguments: BlockJobCancel) -> None:
    job = services.jobs.get_legacy(arguments.device)
    if job.paused and not arguments.force and job.status in (Status.RUNNING, Status.PAUSED):
        raise BlockdError(f"The block job for device '{job.id}' is currently paused")
    await job.cancel()


def block_complete(services: Services, arguments: OfBlockJob) -> None:
    services.jobs.get_legacy(arguments.device).complete()


async def block_finalize(services: Services, arguments: BlockJobFinalize) -> None:
    await services.jobs.get_legacy(arguments.id).finalize()


def block_dismiss(services: Services, arguments: BlockJobDismiss) -> None:
    services.jobs.get_legacy(arguments.id).dismiss()


def block_set_speed(services: Services, arguments: BlockJobSetSpeed) -> None:
    services.jobs.get_legacy(arguments.device).set_speed(arguments.speed)


def block_change(services: Services, arguments: BlockJobChangeOptions) -> None:
    services.jobs.get_legacy(arguments.id).change()


def query_jobs(services: Services, _arguments: QueryJobs) -> list[dict[str, Any]]:
    return services.jobs.query()


def query_block_jobs(services: Services, _arguments: QueryBlockJobs) -> list[dict[str, Any]]:
    return services.jobs.query_block()
