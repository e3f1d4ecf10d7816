"""Readers of an instant, while guests write: they see that instant, all of it, or an error."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from blockd.backup import (
    BackupJob,
    BackupRequest,
    CopyBeforeWriteDriver,
    Keeping,
    OnErrors,
    SnapshotAccessDriver,
    Sync,
    plan_backup,
)
from blockd.block import Graph, Node
from blockd.errors import BlockdError, WouldBlock
from blockd.events import Bus
from blockd.job import Jobs
from tests.helpers.backup_rig import CLUSTER, PATIENCE_SECONDS, start_job, use_small_limits
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay

CLUSTERS = 12
SIZE = CLUSTERS * CLUSTER - 512
#: One for each guest; their edges lie within clusters.
STRIPE = SIZE // 3

#: A sync none backup into an overlay, such a filter with an overlay, and snapshot-access.
KINDS = ["backup", "filter", "access"]


@dataclass(frozen=True)
class Access:
    """Something a guest or a reader does, ``turns`` of the scheduler after what it did before."""

    kind: str
    offset: int
    length: int
    turns: int


@dataclass(frozen=True)
class Program:
    kind: str
    content: Sequence[int]
    guests: Sequence[Sequence[Access]]
    readers: Sequence[Sequence[Access]]
    failing_write: int | None
    breaks_writes: bool
    nowait: Sequence[bool]
    delays: Sequence[int]


@st.composite
def accesses(draw: st.DrawFn, kinds: Sequence[str]) -> Sequence[Access]:
    made = []
    for _ in range(draw(st.integers(1, 6))):
        offset = draw(st.integers(0, SIZE - 1))
        length = draw(st.integers(1, min(5 * CLUSTER, SIZE - offset)))
        made.append(Access(draw(st.sampled_from(kinds)), offset, length, draw(st.integers(0, 12))))
    return made


@st.composite
def programs(draw: st.DrawFn) -> Program:
    writes = accesses(["write", "write_nowait", "write_zeroes", "discard"])
    return Program(
        kind=draw(st.sampled_from(KINDS)),
        content=draw(st.lists(st.integers(0, 2), min_size=CLUSTERS, max_size=CLUSTERS)),
        guests=draw(st.lists(writes, min_size=1, max_size=3)),
        readers=draw(st.lists(accesses(["read", "allocation"]), min_size=1, max_size=3)),
        failing_write=draw(st.none() | st.integers(1, 8)),
        breaks_writes=draw(st.booleans()),
        nowait=draw(st.lists(st.booleans(), min_size=1, max_size=8)),
        delays=draw(st.lists(st.integers(0, 5), min_size=1, max_size=8)),
    )


class Run:
    """A program at work: guests write to ``source``, readers read ``shown``."""

    def __init__(self, program: Program, tasks: trio.Nursery) -> None:
        self.program = program
        content = b"".join(bytes([byte]) * CLUSTER for byte in program.content)[:SIZE]
        self.source_driver = MemoryDriver(content)
        self.graph = Graph(tasks)
        self.source = self.graph.add("source", self.source_driver, owned=True)
        backing = None if program.kind == "access" else self.source
        self.target_driver = MemoryOverlay(SIZE, backing)
        self.target = self.graph.add("target", self.target_driver, owned=True)
        self.jobs = Jobs(tasks, Bus())
        self.frozen = content
        #: Nothing of the instant is to be seen any more.
        self.failed = False

    async def play(self) -> None:
        if self.program.kind == "backup":
            job = await self._start_job()
        else:
            await self._put_filter_in()
            job = None
        self._disturb()
        async with trio.open_nursery() as nursery:
            for number, guest in enumerate(self.program.guests):
                nursery.start_soon(self._guest, guest, number * STRIPE)
            for reader in self.program.readers:
                nursery.start_soon(self._reader, reader)
        await self._reader([Access("read", 0, SIZE, 0), Access("allocation", 0, SIZE, 0)])
        if job is not None:
            with suppress(BlockdError):
                job.request_cancel()
            await job.wait_concluded()
            job.dismiss()
        await self.graph.close()

    async def _start_job(self) -> BackupJob:
        self.shown = self.target
        plan = plan_backup(BackupRequest(Sync.NONE), self.source, self.target)
        job = BackupJob(
            "j", plan, self.source, self.target, on_errors=OnErrors(), auto_dismiss=False
        )
        await start_job(self.jobs, self.source, job)
        return job

    async def _put_filter_in(self) -> None:
        keeping = Keeping(breaks_writes=self.program.breaks_writes)
        driver = await CopyBeforeWriteDriver.open(
            self.graph, "node 'filter'", self.source, self.target, keeping, read_only=False
        )
        node = self.graph.add("filter", driver, owned=True)
        self.shown = self.target
        if self.program.kind == "access":
            access = SnapshotAccessDriver(node, read_only=False, unmap=False)
            self.shown = self.graph.add("access", access, owned=True)

    def _disturb(self) -> None:
        nowait, delays = itertools.cycle(self.program.nowait), itertools.cycle(self.program.delays)
        for driver in (self.source_driver, self.target_driver):
            driver.nowait = lambda _: next(nowait)
            driver.delay = lambda _: next(delays)
        if self.program.failing_write is not None:
            self.target_driver.fail("write", errno.ENOSPC, nth=self.program.failing_write)

    # -- those who write ---------------------------------------------------------------------

    async def _guest(self, accesses: Sequence[Access], start: int) -> None:
        """It keeps to a stripe of its own, and finds there what it wrote."""
        model = bytearray(self.frozen[start : start + STRIPE])
        for number, access in enumerate(accesses):
            await turns(access.turns)
            offset = access.offset % STRIPE
            data = bytes([10 + number]) * min(access.length, STRIPE - offset)
            if access.kind in ("write_zeroes", "discard"):
                data = bytes(len(data))
            try:
                await self._write(access.kind, start + offset, memoryview(data))
            except OSError:
                # Where old data can't be kept, the guest may be the one that fails.
                assert self.program.kind != "backup"
                assert self.program.breaks_writes
                assert self.program.failing_write is not None
            else:
                model[offset : offset + len(data)] = data
            seen = memoryview(bytearray(STRIPE))
            await self.source.read(start, seen)
            assert seen == model

    async def _write(self, kind: str, offset: int, view: memoryview) -> None:
        node = self.source
        match kind:
            case "write":
                await node.write(offset, view)
            case "write_nowait":
                try:
                    node.write_nowait(offset, view)
                except WouldBlock:
                    await node.write(offset, view)
            case "write_zeroes":
                await node.write_zeroes(offset, len(view), unmap=True)
            case "discard":
                await node.discard(offset, len(view))

    # -- those who read ----------------------------------------------------------------------

    async def _reader(self, accesses: Sequence[Access]) -> None:
        for access in accesses:
            await turns(access.turns)
            try:
                await self._look(self.shown, access.kind, access.offset, access.length)
            except OSError:
                assert self.program.failing_write is not None
                # From now on nobody sees anything.
                self.failed = self.failed or self.program.kind == "backup"
            else:
                assert not self.failed

    async def _look(self, node: Node, kind: str, offset: int, length: int) -> None:
        if kind == "read":
            view = memoryview(bytearray(length))
            await node.read(offset, view)
            assert view == self.frozen[offset : offset + length]
            return
        at = offset
        while at < offset + length:
            for run in await node.allocation(at, offset + length - at):
                assert run.extent.offset == at
                at = run.extent.end
                assert not (run.zero and any(self.frozen[run.extent.offset : at]))


async def turns(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def play(program: Program) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as tasks:
            await Run(program, tasks).play()


@settings(max_examples=800, deadline=None)
@given(programs())
def test_readers_see_the_instant(program: Program) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_limits(monkeypatch)
        trio.run(play, program, clock=MockClock(autojump_threshold=0))
