"""A job: work in the background that a client started, watches and steers by its id."""

from __future__ import annotations

import errno as errnos
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.job.failure import clean_up
from blockd.job.rate import RateLimit, check_speed
from blockd.job.states import (
    MAY,
    NEXT,
    ErrorAction,
    IoStatus,
    OnError,
    Status,
    Verb,
    action_on_error,
)

if TYPE_CHECKING:
    # It leads jobs, as this module defines them.
    from blockd.job.group import Group


class Job(ABC):
    """One job, from its creation to its dismissal. ``Jobs`` brings it to life, in a ``Group``.

    A subclass says what the job does, in the hooks below; they are called in this order and each
    at most once::

        start                  at the instant of the job's start
        revoke                 at the same instant: it does not begin after all; then only close
        run, prepare           may be cancelled at any await, and may fail
        commit                 at one instant for all of the group: all has gone well
        abort                  it has not: something failed, even commit, or it was cancelled
        close                  always

    A hook fails by raising: ``JobError`` or ``OSError`` where that was to be reckoned with. The
    last two are shielded from cancellation; one that takes longer than
    ``limits.JOB_CLEANUP_SECONDS`` is cancelled after all and counts as failed, so its effect is
    one step without an await, and nothing is awaited after it.

    The calls for clients refuse with ``BlockdError``, having changed nothing, where the job's
    status does not allow them (``states.MAY``).
    """

    #: The job's type in QMP.
    kind = "backup"
    #: Whether the older commands and events, those of block jobs, know the job.
    block_job = True

    def __init__(
        self, job_id: str, *, speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        """``speed`` is in bytes per second, 0 for no limit."""
        self.id = job_id
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = Status.UNDEFINED
        self.io_status = IoStatus.OK
        #: Why the job failed, once it has.
        self.error: str | None = None
        #: Bytes; ``current_progress`` equals ``total_progress`` when all is done.
        self.current_progress = 0
        self.total_progress = 0
        #: A pause is asked for, by a command or an error. It is complete when ``busy`` is false.
        self.paused = False
        self.cancelled = False
        self._bus: Bus
        self._forget: Callable[[Job], None]
        self._rate = RateLimit(speed)
        self._in_flight = 0
        self._waiters = trio.lowlevel.ParkingLot()
        #: Those that it ends with, from the moment at which it begins.
        self._group: Group | None = None
        self._concluded = trio.Event()

    # --- what a subclass says ----------------------------------------------------------------

    @abstractmethod
    def start(self) -> None:
        """Take effect, or raise having changed nothing."""

    @abstractmethod
    def revoke(self) -> None:
        """Undo ``start``, which nothing has followed yet."""

    @abstractmethod
    async def run(self) -> None:
        """Do the work, in turns (``turn``), so that it can be paused and slowed down."""

    @abstractmethod
    async def prepare(self) -> None:
        """Make the result durable. What can fail at the end fails here."""

    @abstractmethod
    def commit(self) -> None:
        """Let the result count."""

    @abstractmethod
    async def abort(self) -> None:
        """Undo what ``start`` did, as far as it can be undone now."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything held since the job was made, also where ``start`` never ran."""

    # --- what a subclass uses ----------------------------------------------------------------

    def set_total(self, nbytes: int) -> None:
        """Say how many bytes the job copies in all."""
        self.total_progress = nbytes

    def advance(self, nbytes: int) -> None:
        """Count bytes as copied."""
        self.current_progress += nbytes

    async def pause_point(self) -> None:
        """Wait while the job is paused."""
        await trio.lowlevel.checkpoint()
        while self.paused:
            await self._waiters.park()

    async def throttle(self, nbytes: int) -> None:
        """Wait while the job is paused or has used up its speed, then ``charge`` the bytes."""
        while True:
            await self.pause_point()
            now = trio.current_time()
            ready = self._rate.ready_at(now)
            if ready <= now:
                break
            with trio.move_on_at(ready):
                await self._waiters.park()
        self.charge(nbytes)

    def charge(self, nbytes: int) -> None:
        """Count bytes against the speed, for a turn that learns only then how many they are."""
        self._rate.charge(nbytes)

    @asynccontextmanager
    async def turn(self, nbytes: int = 0) -> AsyncIterator[None]:
        """Copy something: as ``throttle``, and a pause is complete only when the body has ended.

        Several tasks of a job may be in a turn at once. Nothing is awaited between the end of
        the wait and the body, so a body that first claims its blocks and charges them never
        holds blocks while it waits.
        """
        await self.throttle(nbytes)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self._settle_pause()

    def handle_error(
        self, operation: Literal["read", "write"], errno: int, policy: OnError
    ) -> ErrorAction:
        """Decide about and announce an I/O error of ``run``.

        ``report``: the caller fails the job by raising. ``ignore``: it goes on. ``stop``: it goes
        on too, with the blocks given back; the next turn waits until the job is resumed.
        """
        action = action_on_error(policy, errno)
        data = {"device": self.id, "operation": operation, "action": action.value}
        self._bus.publish("BLOCK_JOB_ERROR", data)
        if action is ErrorAction.STOP:
            if self.io_status is IoStatus.OK:
                full = errno == errnos.ENOSPC
                self.io_status = IoStatus.NOSPACE if full else IoStatus.FAILED
            self.paused = True
            self._settle_pause()
        return action

    # --- what clients ask --------------------------------------------------------------------

    @property
    def speed(self) -> int:
        return self._rate.speed

    @property
    def busy(self) -> bool:
        """Some I/O of the job is in flight."""
        return self._in_flight > 0

    def pause(self) -> None:
        """Stop at the next turn; at once where nothing is in flight."""
        self._require(Verb.PAUSE)
        if self.paused:
            raise BlockdError("Job is already paused")
        self.paused = True
        self._settle_pause()

    def resume(self) -> None:
        """Go on after a pause, or after an error that stopped the job."""
        if not self.paused:
            raise BlockdError("Can't resume a job that was not paused")
        self._require(Verb.RESUME)
        self.end_pause()

    def set_speed(self, speed: int) -> None:
        """Limit the speed to bytes per second, 0 for no limit, from now on."""
        self._require(Verb.SET_SPEED)
        check_speed(speed)
        self._rate.set_speed(speed)
        self._waiters.unpark_all()

    def complete(self) -> None:
        """End the ``ready`` phase. No job here has one, so the job's status always refuses."""
        self._require(Verb.COMPLETE)

    def change(self) -> None:
        """Change what the job does. No job here can, but its status is looked at first."""
        self._require(Verb.CHANGE)
        raise BlockdError("Job type does not support change")

    async def cancel(self) -> None:
        """Cancel the job and wait until it has concluded, with its group.

        The wait is at most ``limits.CANCEL_REPLY_SECONDS``, because an I/O in flight may hang;
        the job then concludes later.
        """
        self.request_cancel()
        with trio.move_on_after(limits.CANCEL_REPLY_SECONDS):
            await self._wait_ended()

    def request_cancel(self) -> None:
        """Cancel the job, which concludes later; refused once its result is being committed."""
        self._require(Verb.CANCEL)
        # One that has no group will never have one: it is being given up.
        if self._group is not None:
            if self._group.committing:
                raise self._refusal(Verb.CANCEL)
            self._group.cancel()

    async def finalize(self) -> None:
        """Let a pending job and its group finish, and wait until they have concluded."""
        self._require(Verb.FINALIZE)
        if self._group is not None:
            self._group.finalize()
        await self._wait_ended()

    def dismiss(self) -> None:
        """Forget a concluded job; its id is free again."""
        self._require(Verb.DISMISS)
        self._move(Status.NULL)

    async def wait_concluded(self) -> None:
        await self._concluded.wait()

    async def _wait_ended(self) -> None:
        await self._concluded.wait()
        if self._group is not None:
            await self._group.ended.wait()

    # --- its life, as the registry and its group lead it ---------------------------------------

    def create(self, bus: Bus, forget: Callable[[Job], None]) -> None:
        """Come into being; ``forget`` is called when the job has become ``null``."""
        self._bus = bus
        self._forget = forget
        self._move(Status.CREATED)
        try:
            check_speed(self.speed)
        except BlockdError:
            self._move(Status.NULL)
            raise

    async def give_up(self) -> None:
        """End a job that does not begin; its ``start`` was refused or revoked, or never called."""
        if self.status is Status.CREATED:
            self._move(Status.ABORTING)
        await clean_up(self.id, self.close)
        if self.status is Status.ABORTING:
            self._move(Status.CONCLUDED)
            self._move(Status.NULL)
        self._concluded.set()

    def begin(self, group: Group) -> None:
        """Begin to run; clients expect to see the pause in which a backup starts."""
        self._group = group
        self._move(Status.RUNNING)
        if self.block_job:
            self._move(Status.PAUSED)

    def go(self) -> None:
        """End the pause of the start."""
        if self.block_job:
            self._move(Status.RUNNING)

    async def work(self) -> None:
        """Do all that is done before the end of the group."""
        await self.run()
        await self.pause_point()
        self._move(Status.WAITING)

    def become_pending(self) -> None:
        """All of the group have done their work."""
        self._move(Status.PENDING)
        if not self.auto_finalize:
            self._bus.publish("BLOCK_JOB_PENDING", {"type": self.kind, "id": self.id})

    def fail(self, error: str) -> None:
        """Say why it fails. One that only waits for others is shown to when it is its turn."""
        self.error = error
        self.end_pause()
        if self.status is Status.RUNNING:
            self._move(Status.ABORTING)

    async def conclude(self) -> None:
        """End, by ``commit`` having been called or else with ``error``."""
        if self.error is not None:
            if self.status is not Status.ABORTING:
                self._move(Status.ABORTING)
            await clean_up(self.id, self.abort)
        await clean_up(self.id, self.close)
        if self.block_job:
            self._publish_end()
        self._move(Status.CONCLUDED)
        if self.auto_dismiss:
            self._move(Status.NULL)
        self._concluded.set()

    def _publish_end(self) -> None:
        name = "BLOCK_JOB_CANCELLED" if self.cancelled else "BLOCK_JOB_COMPLETED"
        data = {
            "device": self.id,
            "len": self.total_progress,
            "offset": self.current_progress,
            "speed": self.speed,
            "type": self.kind,
        }
        if self.error is not None and not self.cancelled:
            data["error"] = self.error
        self._bus.publish(name, data)

    # --- states --------------------------------------------------------------------------------

    def _move(self, status: Status) -> None:
        """Change the status; the only place that does."""
        assert status in NEXT[self.status], f"job {self.id}: {self.status} to {status}"
        self.status = status
        self._bus.publish("JOB_STATUS_CHANGE", {"status": status.value, "id": self.id})
        if status is Status.NULL:
            self._forget(self)

    def _require(self, verb: Verb) -> None:
        if self.status not in MAY[verb]:
            raise self._refusal(verb)

    def _refusal(self, verb: Verb) -> BlockdError:
        return BlockdError(
            f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'"
        )

    def _settle_pause(self) -> None:
        if self.paused and not self.cancelled and not self.busy and self.status is Status.RUNNING:
            self._move(Status.PAUSED)

    def end_pause(self) -> None:
        """Go on, where the job is paused, or is about to be."""
        self.paused = False
        self.io_status = IoStatus.OK
        if self.status is Status.PAUSED:
            self._move(Status.RUNNING)
        self._waiters.unpark_all()
