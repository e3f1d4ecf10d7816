"""Jobs that end together, all well or all badly. A job that stands alone is a group of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import trio

from blockd.job.failure import CANCELLED, clean_up, guarded
from blockd.job.job import Job
from blockd.job.states import Status


class Group:
    """Leads its jobs from their start to their conclusion.

    Each works by itself until all have done their work (``waiting``). Then each makes its result
    durable, and all results begin to count at one instant: so where one fails, or is cancelled,
    the others are cancelled, and none counts. Whatever happens to all happens to the newest
    first, as in QEMU.
    """

    def __init__(
        self, jobs: Sequence[Job], instant: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        """``jobs``: the oldest first. ``instant`` gives a context in which all may commit."""
        self.jobs = tuple(reversed(jobs))
        self._instant = instant
        self._scopes = {job: trio.CancelScope() for job in self.jobs}
        self._finalized = trio.Event()
        #: It is decided that all end well, but for a failure to do so: too late for a cancel.
        self.committing = False
        #: All have concluded.
        self.ended = trio.Event()

    def cancel(self) -> None:
        """Cancel all that have not failed."""
        for job in self.jobs:
            if job.error is None:
                job.cancelled = True
            # Cancelled first, no task of a paused job begins another turn when the pause ends.
            self._scopes[job].cancel()
            job.end_pause()

    def finalize(self) -> None:
        """Let all jobs finish, which are ``pending``."""
        self._finalized.set()

    async def live(self) -> None:
        """Lead the jobs to their conclusion; only a cancellation gets out of here."""
        try:
            async with trio.open_nursery() as nursery:
                for job in self.jobs:
                    nursery.start_soon(self._lead, job, name=f"job {job.id}")
        except BaseException:
            # Not the jobs are cancelled but everything.
            self.cancel()
            raise
        finally:
            await self._conclude()

    async def _lead(self, job: Job) -> None:
        error = await guarded(job.id, partial(self._work, job), self._scopes[job])
        if job.cancelled:
            error = CANCELLED
        if error is not None:
            job.fail(error)
            self.cancel()

    async def _work(self, job: Job) -> None:
        await job.work()
        if all(each.status is Status.WAITING for each in self.jobs):
            for each in self.jobs:
                each.become_pending()
            if all(each.auto_finalize for each in self.jobs):
                self._finalized.set()
        await self._finalized.wait()
        await job.prepare()

    async def _conclude(self) -> None:
        if not any(job.cancelled or job.error is not None for job in self.jobs):
            self.committing = True
            error = await clean_up(self.jobs[0].id, self._commit)
        else:
            error = CANCELLED
        for job in self.jobs:
            if error is not None and job.error is None:
                job.fail(error)
        for job in self.jobs:
            await job.conclude()
        self.ended.set()

    async def _commit(self) -> None:
        async with self._instant():
            for job in self.jobs:
                job.commit()
