"""What the queries tell of a job."""

from __future__ import annotations

from typing import Any

from blockd.job.job import Job
from blockd.job.states import Status


def job_info(job: Job) -> dict[str, Any]:
    """The job's row of ``query-jobs``."""
    return {
        "current-progress": job.current_progress,
        "status": job.status.value,
        "total-progress": job.total_progress,
        "type": job.kind,
        "id": job.id,
        **_error_field(job),
    }


def block_job_info(job: Job) -> dict[str, Any]:
    """The job's row of ``query-block-jobs``."""
    return {
        "auto-finalize": job.auto_finalize,
        "io-status": job.io_status.value,
        "device": job.id,
        "auto-dismiss": job.auto_dismiss,
        "busy": job.busy,
        "len": job.total_progress,
        "offset": job.current_progress,
        "status": job.status.value,
        "paused": job.paused,
        "speed": job.speed,
        "ready": job.status in (Status.READY, Status.STANDBY),
        "type": job.kind,
        **_error_field(job),
    }


def _error_field(job: Job) -> dict[str, str]:
    return {} if job.error is None else {"error": job.error}
