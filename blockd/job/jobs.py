"""The jobs there are, by id."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from typing import Any

import trio

from blockd.errors import BlockdError, DeviceNotActiveError
from blockd.events import Bus
from blockd.job.job import Job
from blockd.job.states import Status

_log = logging.getLogger(__name__)

_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Jobs:
    """Starts jobs in a nursery and keeps each until it is dismissed.

    A job that fails never disturbs the nursery. When the nursery is cancelled, every job aborts
    before its task ends.
    """

    def __init__(self, nursery: trio.Nursery, bus: Bus) -> None:
        self._nursery = nursery
        self._bus = bus
        self._jobs: dict[str, Job] = {}

    async def start(self, job: Job) -> None:
        """Start a job; it runs when this returns. The job is this object's from the call on.

        Where it raises (``BlockdError`` for an id that is invalid or taken, for a negative
        speed, or whatever ``job.start`` raises), nothing has happened and the job is closed.
        """
        try:
            self._admit(job)
            await job.begin()
        except BaseException:
            await job.give_up()
            raise
        self._nursery.start_soon(job.live, name=f"job {job.id}")

    def get(self, job_id: str) -> Job:
        """The job a ``job-*`` command names, or ``BlockdError``."""
        if job_id not in self._jobs:
            raise BlockdError("Job not found")
        return self._jobs[job_id]

    def get_legacy(self, device: str) -> Job:
        """The job a ``block-job-*`` command names, or ``DeviceNotActiveError``."""
        if device not in self._jobs:
            raise DeviceNotActiveError(f"Block job '{device}' not found")
        return self._jobs[device]

    def newest_first(self) -> list[Job]:
        return list(reversed(self._jobs.values()))

    def query(self) -> list[dict[str, Any]]:
        """What ``query-jobs`` answers."""
        return [job.info() for job in self.newest_first()]

    def query_block(self) -> list[dict[str, Any]]:
        """What ``query-block-jobs`` answers."""
        return [job.block_info() for job in self.newest_first()]

    async def cancel_all(self, deadline_seconds: float) -> None:
        """Cancel every job, wait until all have concluded, and dismiss them.

        A job that is being committed is not cancelled, only waited for. After
        ``deadline_seconds`` this returns whatever is still going on.
        """
        jobs = self.newest_first()
        for job in jobs:
            with suppress(BlockdError):
                job.request_cancel()
        with trio.move_on_after(deadline_seconds) as scope:
            for job in jobs:
                await job.wait_concluded()
                if job.status is Status.CONCLUDED:
                    job.dismiss()
        if scope.cancelled_caught:
            _log.error("jobs not ended within %s seconds: %s", deadline_seconds, list(self._jobs))

    def check_id(self, job_id: str) -> None:
        """Raise ``BlockdError`` unless a new job may have this id."""
        if not _JOB_ID.fullmatch(job_id):
            raise BlockdError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs:
            raise BlockdError(f"Job ID '{job_id}' already in use")

    def _admit(self, job: Job) -> None:
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.create(self._bus, self._forget)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
