"""A job that does one thing in one go, such as making an image."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from blockd.job.job import Job


class OneStepJob(Job):
    """Runs ``work``; it is kept until it is dismissed, for nothing else tells how it went."""

    block_job = False

    def __init__(self, job_id: str, kind: str, work: Callable[[], Awaitable[None]]) -> None:
        """``work`` fails by raising ``BlockdError`` or ``OSError``, and undoes itself then."""
        super().__init__(job_id, auto_dismiss=False)
        self.kind = kind
        self._work_once = work

    def start(self) -> None:
        """Nothing happens before it runs."""

    def revoke(self) -> None:
        """Nothing has happened."""

    async def run(self) -> None:
        self.set_total(1)
        try:
            await self._work_once()
        finally:
            self.advance(1)

    async def prepare(self) -> None:
        await trio.lowlevel.checkpoint()

    def commit(self) -> None:
        """The work has counted since it was done."""

    async def abort(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
