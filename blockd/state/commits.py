"""Group commit: all changes that wait share one transaction, in one worker thread."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from blockd import limits
from blockd.state.database import Database

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(eq=False, slots=True)
class Pending:
    """A change on its way into the database; many may wait for one.

    ``begin`` is called, on the loop, as the transaction begins: nothing may be added to the
    change any more.
    """

    apply: Callable[[sqlite3.Connection], None] = field(default=lambda _: None)
    begin: Callable[[], None] = field(default=lambda: None)
    queued: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None


class Commits:
    """The database, for tasks."""

    def __init__(self, database: Database, nursery: trio.Nursery) -> None:
        """In ``nursery`` transactions go on, whoever waits for them."""
        self._database = database
        self._nursery = nursery
        self._running = False
        self._waiting: list[Pending] = []
        self._one = trio.Lock()
        #: Transactions that have begun; for tests and measurements.
        self.begun = 0

    async def commit(self, change: Pending, *, shield: bool = True) -> None:
        """Return once it is durable. Raises ``OSError``.

        Whoever is cancelled while he waits has changed the database all the same: so that is only
        possible without the ``shield``. Nobody waits for more than the transaction that is under
        way when he comes, and his own.
        """
        if not change.queued:
            change.queued = True
            self._waiting.append(change)
            if not self._running:
                self._running = True
                self._nursery.start_soon(self._run)
        with trio.CancelScope(shield=shield):
            await change.ended.wait()
        if change.error is not None:
            raise OSError(change.error.errno, change.error.strerror)

    async def _run(self) -> None:
        """Commit as long as anything waits for that."""
        try:
            with trio.CancelScope(shield=True):
                while self._waiting:
                    async with self._one:
                        await self._run_one()
        finally:
            self._running = False

    async def _run_one(self) -> None:
        batch, self._waiting = self._waiting, []
        self.begun += 1
        for change in batch:
            change.begin()
        try:
            await trio.to_thread.run_sync(self._commit, batch)
        finally:
            for change in batch:
                change.ended.set()

    def _commit(self, batch: Sequence[Pending]) -> None:
        """One that fails must not take the others with it: then each is tried alone."""
        try:
            self._database.commit(batch)
        except OSError as error:
            if len(batch) > 1:
                for change in batch:
                    self._commit([change])
            else:
                batch[0].error = error
        except Exception as error:  # noqa: BLE001 - for those who wait it is a disk that fails
            _log.exception("a transaction failed")
            for change in batch:
                change.error = OSError(errno.EIO, repr(error))

    async def keep_short(self) -> None:
        """Give space that removed bitmaps had back to the host, little by little; never ends."""
        more = False
        while True:
            seconds = limits.STATE_SHORTEN_SECONDS if more else limits.STATE_SHORTEN_LOOK_SECONDS
            await trio.sleep(seconds)
            more = False
            with suppress(OSError):
                more = await self.read(Database.shorten)

    async def read(self, call: Callable[[Database], _Result]) -> _Result:
        """Run ``call`` in a thread while nothing is committed. Raises what it raises."""
        async with self._one:
            return await trio.to_thread.run_sync(call, self._database)
