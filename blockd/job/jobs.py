"""The jobs there are, by id."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from blockd.errors import BlockdError, DeviceNotActiveError
from blockd.events import Bus
from blockd.job.group import Group
from blockd.job.info import block_job_info, job_info
from blockd.job.job import Job
from blockd.job.states import Status

_log = logging.getLogger(__name__)

_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Jobs:
    """Runs jobs in a nursery and keeps each until it is dismissed.

    A job that fails never disturbs the nursery. When the nursery is cancelled, every job aborts
    before its task ends.
    """

    def __init__(self, nursery: trio.Nursery, bus: Bus) -> None:
        self._nursery = nursery
        self._bus = bus
        self._jobs: dict[str, Job] = {}

    def rehearsal(self) -> Jobs:
        """A registry that has the same ids, and of whose jobs nobody hears: none may begin."""
        copy = Jobs(self._nursery, Bus())
        copy._jobs = dict(self._jobs)
        return copy

    def admit(self, job: Job) -> None:
        """Make a job known, and let its start take effect; ``begin`` or ``revoke`` follows.

        Raises ``BlockdError`` for an id that is invalid or taken, for a negative speed, and
        whatever ``job.start`` raises. Then nothing has happened yet, and ``give_up`` is due.
        """
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.create(self._bus, self._forget)
        job.start()

    def begin(self, groups: Sequence[Group]) -> None:
        """Let the jobs of the groups run, which were admitted at this instant, oldest first."""
        jobs = [(job, group) for group in reversed(groups) for job in group.jobs]
        for job, group in jobs:
            job.begin(group)
        for job, _ in jobs:
            job.go()
        for group in groups:
            self._nursery.start_soon(group.live)

    def get(self, job_id: str) -> Job:
        """The job a ``job-*`` command names, or ``BlockdError``."""
        if job_id not in self._jobs:
            raise BlockdError("Job not found")
        return self._jobs[job_id]

    def get_legacy(self, device: str) -> Job:
        """The job a ``block-job-*`` command names, or ``DeviceNotActiveError``."""
        job = self._jobs.get(device)
        if job is None or not job.block_job:
            raise DeviceNotActiveError(f"Block job '{device}' not found")
        return job

    def newest_first(self) -> list[Job]:
        return list(reversed(self._jobs.values()))

    def query(self) -> list[dict[str, Any]]:
        """What ``query-jobs`` answers."""
        return [job_info(job) for job in self.newest_first()]

    def query_block(self) -> list[dict[str, Any]]:
        """What ``query-block-jobs`` answers."""
        return [block_job_info(job) for job in self.newest_first() if job.block_job]

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

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
