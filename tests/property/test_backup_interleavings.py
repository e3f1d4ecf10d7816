"""Whatever guests write meanwhile and whatever fails: no change is ever lost.

A backup gives a target that equals the source at its start, or it fails and its bitmap still
covers every change. Either way the next backup from that bitmap makes the target equal to the
source, and that is always checked by comparing bytes.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd.backup import BackupJob, BitmapMode, OnErrors, Sync
from blockd.errors import BlockdError, WouldBlock
from blockd.job import OnError, Status
from tests.helpers.backup_rig import CLUSTER, Rig, open_rig, use_small_limits
from tests.helpers.memory_driver import Fault, MemoryDriver
from tests.helpers.stepped_driver import SteppedDriver

ON_SUCCESS, ALWAYS, NEVER = BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS, BitmapMode.NEVER

#: Every backup that the peer takes too: what is copied, and when the bitmap forgets.
KINDS: list[tuple[Sync, BitmapMode | None]] = [
    (Sync.FULL, None),
    (Sync.FULL, ON_SUCCESS),
    (Sync.FULL, ALWAYS),
    (Sync.INCREMENTAL, ON_SUCCESS),
    (Sync.BITMAP, ON_SUCCESS),
    (Sync.BITMAP, ALWAYS),
    (Sync.BITMAP, NEVER),
]

#: What may fail; a guest's own writes do not.
POINTS = [
    ("source", "read"),
    ("source", "allocation"),
    ("target", "write"),
    ("target", "write_zeroes"),
    ("target", "allocation"),
    ("target", "flush"),
]


@dataclass(frozen=True)
class Write:
    """What a guest does, after it has let others have some turns."""

    kind: str
    offset: int
    length: int
    byte: int
    inline: bool = False
    turns: int = 0


@dataclass(frozen=True)
class Trouble:
    """The ``nth`` such operation, and ``times - 1`` after it, fail."""

    side: str
    operation: str
    nth: int
    errno: int
    times: int = 1


@dataclass(frozen=True)
class Program:
    """One run: a disk, what was written since the last backup, a backup, and who disturbs it."""

    #: One byte for each cluster; the last cluster is partial.
    content: bytes
    granularity_bytes: int
    sync: Sync
    mode: BitmapMode | None
    policy: OnError
    before: Sequence[Write]
    guests: Sequence[Sequence[Write]]
    troubles: Sequence[Trouble] = ()
    cancel_after_turns: int | None = None
    #: The first guest goes away after so many turns, in the middle of a write.
    guest_leaves_after_turns: int | None = None
    #: The drivers work in threads, where nothing can be cancelled.
    stubborn: bool = False
    resumed: bool = True
    power_lost: bool = False
    #: The drivers have descriptors, by which threads copy.
    threads: bool = False
    #: The bitmap records what guests write during the backup.
    recording: bool = True
    speed: int = 0
    #: How the drivers behave, over and over: whether a nowait call may go, how long others take.
    nowait: Sequence[bool] = (False,)
    delays: Sequence[int] = (0,)


# -- programs ------------------------------------------------------------------------------------


def writes(size: int, *, count: int) -> st.SearchStrategy[list[Write]]:
    offsets = st.integers(0, size - 1)
    # Mostly short ones: what a guest writes is dirty again, and hides what a backup forgot.
    lengths = st.sampled_from([1, 100, 600, CLUSTER, 2 * CLUSTER, 2 * CLUSTER, size])
    one = st.builds(
        lambda kind, offset, length, byte, inline, turns: Write(
            kind, offset, min(length, size - offset), byte, inline, turns
        ),
        st.sampled_from(["write", "write", "write_zeroes", "discard"]),
        offsets,
        lengths,
        st.integers(1, 255),
        st.booleans(),
        st.integers(0, 12),
    )
    return st.lists(one, max_size=count)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    content = draw(st.binary(min_size=1, max_size=24).map(lambda raw: bytes(b % 4 for b in raw)))
    size = len(content) * CLUSTER - 512
    sync, mode = draw(st.sampled_from(KINDS))
    troubles = st.builds(
        lambda point, nth, number, times: Trouble(point[0], point[1], nth, number, times),
        st.sampled_from(POINTS),
        st.integers(1, 12),
        st.sampled_from([errno.EIO, errno.ENOSPC]),
        st.integers(1, 5),
    )
    return Program(
        content=content,
        granularity_bytes=draw(st.sampled_from([512, 1024, 4096])),
        sync=sync,
        mode=mode,
        policy=draw(st.sampled_from(OnError)),
        before=draw(writes(size, count=4)),
        guests=draw(st.lists(writes(size, count=6), max_size=3)),
        troubles=draw(st.lists(troubles, max_size=2)),
        cancel_after_turns=draw(st.none() | st.integers(0, 60)),
        guest_leaves_after_turns=draw(st.none() | st.integers(0, 40)),
        stubborn=draw(st.booleans()),
        resumed=draw(st.booleans()),
        power_lost=draw(st.booleans()),
        threads=draw(st.booleans()),
        recording=draw(st.booleans()),
        speed=draw(st.sampled_from([0, 0, 8 * CLUSTER])),
        nowait=draw(st.lists(st.booleans(), min_size=1, max_size=8)),
        delays=draw(st.lists(st.integers(0, 5), min_size=1, max_size=8)),
    )


# -- running one ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    frozen: bytes
    error: str | None
    ignored_bytes: int
    faults: list[Fault] = field(default_factory=list)


class Run:
    """A program at work."""

    def __init__(self, program: Program, rig: Rig) -> None:
        self.program = program
        self.rig = rig
        self.drivers = {"source": rig.source_driver, "target": rig.target_driver}

    async def play(self) -> Outcome:
        program, rig = self.program, self.rig
        if program.mode is not None:
            rig.add_bitmap(granularity_bytes=program.granularity_bytes)
        await self._guest(program.before)
        job = self._job(program.sync, program.mode, speed=program.speed)
        if program.mode is not None and not program.recording:
            rig.source.bitmaps.get("b").disable()
        self._disturb()
        faults = self._arm()
        frozen = await rig.start(job)
        async with trio.open_nursery() as nursery:
            for number, guest in enumerate(program.guests):
                nursery.start_soon(self._leaving_guest if number == 0 else self._guest, guest)
            async with trio.open_nursery() as helpers:
                helpers.start_soon(self._administrate, job)
                helpers.start_soon(self._cancel, job)
                error = await rig.finish(job)
                helpers.cancel_scope.cancel()
        for driver in self.drivers.values():
            driver.heal()
        return Outcome(frozen, error, job.total_progress - job.current_progress, faults)

    def check_bitmap(self, frozen: bytes) -> None:
        """What is missing on the target is in the bitmap, even where no guest's write put it."""
        if self._needs_full():
            return
        data = self.rig.target_driver.data
        missing = {at for at in range(len(frozen)) if data[at] != frozen[at]}
        assert missing <= self.rig.dirty_bytes(self.rig.source.bitmaps.get("b"))

    async def repair(self) -> str | None:
        """The next backup; it is undisturbed, and takes the bitmap where that may be enough."""
        sync = Sync.FULL if self._needs_full() else Sync.INCREMENTAL
        job = self._job(sync, None if self._needs_full() else ON_SUCCESS)
        await self.rig.start(job)
        return await self.rig.finish(job)

    def _needs_full(self) -> bool:
        """A full backup that fails may have torn what is clean in a bitmap that forgets nothing."""
        program = self.program
        return program.mode is None or (program.sync, program.mode) == (Sync.FULL, ON_SUCCESS)

    def _job(self, sync: Sync, mode: BitmapMode | None, *, speed: int = 0) -> BackupJob:
        policy = self.program.policy
        on_errors = OnErrors(source=policy, target=policy)
        name = None if mode is None else "b"
        return self.rig.job(sync, name, mode, on_errors=on_errors, speed=speed)

    def _disturb(self) -> None:
        nowait, delays = itertools.cycle(self.program.nowait), itertools.cycle(self.program.delays)
        for driver in self.drivers.values():
            driver.stubborn = self.program.stubborn
            driver.nowait = lambda _: next(nowait)
            driver.delay = lambda _: next(delays)

    def _arm(self) -> list[Fault]:
        return [
            self.drivers[each.side].fail(each.operation, each.errno, nth=each.nth, times=each.times)
            for each in self.program.troubles
        ]

    async def _leaving_guest(self, writes: Sequence[Write]) -> None:
        turns = self.program.guest_leaves_after_turns
        if turns is None:
            await self._guest(writes)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guest, writes)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    async def _guest(self, writes: Sequence[Write]) -> None:
        """A guest never meets an error of the backup."""
        node = self.rig.source
        for write in writes:
            for _ in range(write.turns):
                await trio.lowlevel.checkpoint()
            data = memoryview(bytes([write.byte]) * write.length)
            if write.kind == "write_zeroes":
                await node.write_zeroes(write.offset, write.length, unmap=write.inline)
            elif write.kind == "discard":
                await node.discard(write.offset, write.length)
            elif write.inline:
                try:
                    node.write_nowait(write.offset, data)
                except WouldBlock:
                    await node.write(write.offset, data)
            else:
                await node.write(write.offset, data)

    async def _administrate(self, job: BackupJob) -> None:
        """Resume a job that an error stopped, or cancel it in the end."""
        for _ in range(20):
            await wait_all_tasks_blocked()
            if job.status is Status.PAUSED:
                if self.program.resumed:
                    job.resume()
                else:
                    # Guests may break the backup first.
                    await trio.sleep(60)
                    with suppress(BlockdError):
                        job.request_cancel()
                    return
            await trio.sleep(1)

    async def _cancel(self, job: BackupJob) -> None:
        if self.program.cancel_after_turns is None:
            return
        for _ in range(self.program.cancel_after_turns):
            await trio.lowlevel.checkpoint()
        with suppress(BlockdError):
            job.request_cancel()


async def run(program: Program) -> Outcome:
    """Play a program and check all that is promised."""
    size = len(program.content) * CLUSTER - 512
    content = b"".join(bytes([byte]) * CLUSTER for byte in program.content)[:size]
    disk = SteppedDriver if program.threads else MemoryDriver
    source, target = disk(content), disk(content)
    async with open_rig(source, target) as rig:
        playing = Run(program, rig)
        outcome = await playing.play()
        assert not (outcome.error or "").startswith("Internal error")
        assert outcome.ignored_bytes >= 0
        if outcome.error is None and not outcome.ignored_bytes:
            assert target.data == outcome.frozen
            assert target.durable == outcome.frozen
        if program.power_lost:
            target.lose_power()
        playing.check_bitmap(outcome.frozen)
        if program.recording:
            assert await playing.repair() is None
            assert target.data == source.data
    return outcome


def play(program: Program) -> Outcome:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_limits(monkeypatch)
        return trio.run(run, program, clock=MockClock(autojump_threshold=0))


#: A target that refuses a cluster may have damaged granules of it that nobody had written to.
TORN_BESIDE_A_GRANULE = Program(
    content=bytes(3),
    granularity_bytes=512,
    sync=Sync.INCREMENTAL,
    mode=ON_SUCCESS,
    policy=OnError.REPORT,
    before=[Write("write", 0, 1, 1), Write("write", CLUSTER + 512, 1, 1)],
    guests=[[Write("write", 0, 1, 1, turns=3)]],
    troubles=[
        Trouble("source", "read", 1, errno.EIO),
        Trouble("target", "write", 1, errno.EIO),
    ],
    resumed=False,
    threads=True,
    recording=False,
)


@settings(max_examples=800, deadline=None)
@example(TORN_BESIDE_A_GRANULE)
@given(programs())
def test_no_interleaving_loses_a_change(program: Program) -> None:
    play(program)


# -- every I/O fails once --------------------------------------------------------------------------

BUSY_PROGRAM = Program(
    content=bytes([1, 2, 0, 0, 3, 1, 0, 2, 2, 3, 1, 1, 0, 3, 2, 2, 1, 0, 0, 3, 1, 2, 3, 1]),
    granularity_bytes=1024,
    sync=Sync.FULL,
    mode=ALWAYS,
    policy=OnError.REPORT,
    before=[
        Write("write", 100, 3 * CLUSTER, 9),
        Write("write_zeroes", 7 * CLUSTER, 3 * CLUSTER, 0),
        Write("write", 12 * CLUSTER + 17, 5 * CLUSTER, 9),
        Write("write_zeroes", 19 * CLUSTER, CLUSTER, 0),
        Write("write", 22 * CLUSTER, CLUSTER + 512, 9),
    ],
    # Guests keep away from the clusters 0, 1, 8, 14, 15 and 22.
    guests=[
        [
            Write("write", 13 * CLUSTER, 100, 11, inline=True),
            Write("write", 12 * CLUSTER, 100, 11, turns=2),
            Write("write_zeroes", 3 * CLUSTER, 5 * CLUSTER, 0, turns=3),
        ],
        [
            Write("write", 10 * CLUSTER, 3 * CLUSTER, 12, turns=1),
            Write("discard", 2 * CLUSTER, CLUSTER, 0, turns=5),
            Write("write", 23 * CLUSTER, 100, 12, turns=9),
        ],
    ],
    nowait=[True, False],
    delays=[2, 0, 1],
)


def failing(program: Program, side: str, operation: str, times: int) -> Iterator[Outcome]:
    """The program again and again, with its first such operation failing, then its second, …"""
    for nth in itertools.count(1):
        trouble = Trouble(side, operation, nth, errno.EIO, times)
        outcome = play(replace(program, troubles=[trouble]))
        (fault,) = outcome.faults
        if not fault.hits:
            return
        yield outcome


@pytest.mark.parametrize(
    ("policy", "times"),
    [(OnError.REPORT, 1), (OnError.STOP, 2), (OnError.IGNORE, 1), (OnError.IGNORE, 4)],
)
@pytest.mark.parametrize(("threads", "power_lost"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", POINTS)
def test_each_io_fails_in_turn(
    point: tuple[str, str],
    kind: tuple[Sync, BitmapMode | None],
    policy: OnError,
    times: int,
    *,
    threads: bool,
    power_lost: bool,
) -> None:
    program = replace(
        BUSY_PROGRAM,
        sync=kind[0],
        mode=kind[1],
        policy=policy,
        power_lost=power_lost,
        threads=threads,
    )
    outcomes = list(failing(program, *point, times))
    assert outcomes, "the fault was never hit"
