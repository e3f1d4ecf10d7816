"""Threads that copy many clusters in one go, and guests that come across them."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.backup import BitmapMode, OnErrors, Sync
from blockd.backup.sweep import Sweep, Swept
from blockd.block import Descriptor
from blockd.errors import WouldBlock
from blockd.job import OnError, Status
from tests.helpers.backup_rig import CLUSTER, OLD, SIZE, open_rig
from tests.helpers.stepped_driver import SteppedDriver

pytestmark = pytest.mark.usefixtures("small_backup_limits")


# -- one sweep, step by step -----------------------------------------------------------------------


class Disk:
    """A descriptor that notes what is done, and lets the test look in before each step."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.written_back: list[tuple[int, int]] = []
        self.fails_at: int | None = None
        self.before: Callable[[int], None] = lambda _: None

    def _step(self, offset: int, view: memoryview) -> None:
        cluster = offset // CLUSTER
        self.before(cluster)
        if cluster == self.fails_at:
            raise OSError(errno.EIO, "")
        self.done += range(cluster, cluster + len(view) // CLUSTER)

    read = write = _step

    def begin_writeback(self, offset: int, length: int) -> None:
        self.written_back.append((offset, length))


class Copy:
    """A sweep over the clusters 4 to 10, two at a time, run in the test's own thread."""

    def __init__(self, is_plain: Callable[[memoryview], bool] = lambda _: True) -> None:
        self.source, self.target = Disk(), Disk()
        self.unwanted = False
        self.sweep = Sweep(
            4,
            10,
            lambda first, end: (end - first) * CLUSTER,
            shift=10,
            step=2,
            unwanted=lambda: self.unwanted,
            is_plain=is_plain,
        )

    def run(self, end: int = 10) -> Swept:
        source, target = cast(Descriptor, self.source), cast(Descriptor, self.target)
        buffer = memoryview(bytearray(2 * CLUSTER))
        copied = self.sweep.copy(source, target, buffer, end * CLUSTER)
        assert copied == self.sweep.swept.written_end * CLUSTER
        return self.sweep.swept


async def test_a_sweep_copies_in_steps() -> None:
    copy = Copy()
    assert copy.run() == Swept(4, 10, 10, 10)
    assert copy.source.done == copy.target.done == [4, 5, 6, 7, 8, 9]
    assert copy.target.written_back == [(4 * CLUSTER, 6 * CLUSTER)]


async def test_a_sweep_goes_on_where_the_next_part_begins() -> None:
    copy = Copy()
    assert copy.run(7) == Swept(4, 7, 7, 7)
    assert copy.run(8) == Swept(4, 8, 8, 8)
    assert copy.run() == Swept(4, 10, 10, 10)
    assert copy.target.done == [4, 5, 6, 7, 8, 9]
    written_back = [(4, 3), (7, 1), (8, 2)]
    assert copy.target.written_back == [(at * CLUSTER, n * CLUSTER) for at, n in written_back]


@pytest.mark.parametrize(
    ("cluster", "taken", "end"), [(4, False, 10), (7, False, 10), (8, True, 8), (9, True, 9)]
)
@pytest.mark.parametrize("when", ["source", "target"])
async def test_a_guest_takes_what_the_thread_has_not_begun(
    cluster: int, end: int, when: str, *, taken: bool
) -> None:
    copy = Copy()

    def before(step: int) -> None:
        if step == 6:
            assert copy.sweep.take_from(cluster) is taken
            assert copy.sweep.read_end == (6 if when == "source" else 8)

    (copy.source if when == "source" else copy.target).before = before
    assert copy.run() == Swept(4, end, end, end)
    assert copy.target.done == list(range(4, end))


async def test_a_sweep_ends_with_what_another_writes() -> None:
    copy = Copy(is_plain=lambda _: copy.source.done[-1] < 7)
    assert copy.run() == Swept(4, 6, 8, 8)
    assert copy.target.done == [4, 5]


async def test_a_sweep_of_which_all_is_taken_does_nothing() -> None:
    copy = Copy()
    assert copy.sweep.take_from(4)
    assert copy.run() == Swept(4, 4, 4, 4)
    assert copy.source.done == []
    # To the kernel, a length of 0 means everything up to the file's end.
    assert copy.target.written_back == []


async def test_a_sweep_ends_where_the_source_fails() -> None:
    copy = Copy()
    copy.source.fails_at = 6
    assert copy.run() == Swept(4, 6, 6, 8)


async def test_a_sweep_ends_where_the_target_fails() -> None:
    copy = Copy()
    copy.target.fails_at = 6
    assert copy.run() == Swept(4, 6, 8, 8)


async def test_a_sweep_that_is_not_wanted_any_more_ends_its_step() -> None:
    copy = Copy()

    def before(cluster: int) -> None:
        copy.unwanted = cluster == 6

    copy.source.before = before
    assert copy.run() == Swept(4, 8, 8, 8)


async def test_who_waits_for_a_read_is_told() -> None:
    copy = Copy()
    told = trio.Event()
    assert copy.sweep.tell_when_read(5, told.set)
    copy.run()
    await told.wait()
    assert not copy.sweep.tell_when_read(5, told.set)


# -- guests and threads ----------------------------------------------------------------------------


@pytest.fixture
def source() -> SteppedDriver:
    return SteppedDriver(OLD)


@pytest.fixture
def target() -> SteppedDriver:
    return SteppedDriver(SIZE)


async def test_threads_back_up_all(source: SteppedDriver, target: SteppedDriver) -> None:
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
    assert target.durable == OLD
    assert end["len"] == end["offset"] == 21 * CLUSTER
    # 21 clusters by 8, and those by 2.
    assert target.threads == 3
    assert source.counts["read"] == target.counts["write"] == 11


async def test_a_guest_never_waits_for_threads_that_hang_in_the_target(
    source: SteppedDriver, target: SteppedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELD_BYTES_LIMIT", 32 * CLUSTER)
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        with target.hold("write"):
            job = rig.job(Sync.FULL)
            before = await rig.start(job)
            await wait_all_tasks_blocked()
            # All is claimed, and each thread has read a step of its sweep.
            for cluster in range(21):
                rig.source.write_nowait(cluster * CLUSTER, memoryview(b"new"))
        assert await rig.finish(job) is None
    assert target.data == before
    assert source.read_once()


async def test_a_guest_waits_only_until_its_step_has_been_read(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    async with open_rig(source, target) as rig:
        with target.hold("write"), source.hold("read") as reads:
            job = rig.job(Sync.FULL)
            before = await rig.start(job)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as guests:
                for cluster in (0, 1, 1):
                    guests.start_soon(rig.source.write, cluster * CLUSTER, memoryview(b"new"))
                await wait_all_tasks_blocked()
                assert source.data == before
                reads.release()
            assert target.data == bytes(SIZE)
            assert source.data[:3] == b"new"
        assert await rig.finish(job) is None
    assert target.data == before


async def test_a_guest_that_waits_takes_over_where_the_read_fails(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    fault = source.fail("read", errno.EIO)
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        with source.hold("read"):
            job = rig.job(Sync.FULL)
            before = await rig.start(job)
            await wait_all_tasks_blocked()
            guests.start_soon(rig.source.write, 0, memoryview(b"new"))
            await wait_all_tasks_blocked()
        assert await rig.finish(job) is None
    assert fault.hits == 1
    assert target.data == before


async def test_a_thread_of_which_guests_have_taken_all_does_nothing(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    source.nowait = lambda _: True
    # The threads have been asked for and do not run yet.
    target.delay = lambda name: 100 if name == "thread" else 0
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL)
        before = await rig.start(job)
        while target.threads < 3:
            await trio.lowlevel.checkpoint()
        for cluster in (0, 8, 16):
            rig.source.write_nowait(cluster * CLUSTER, memoryview(b"new"))
        assert await rig.finish(job) is None
    assert target.data == before
    assert source.read_once()


async def test_progress_never_runs_ahead(source: SteppedDriver, target: SteppedDriver) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL)
        await rig.start(job)
        for cluster in itertools.cycle(range(21)):
            if job.status is not Status.RUNNING:
                break
            with suppress(WouldBlock):
                rig.source.write_nowait(cluster * CLUSTER, memoryview(b"new"))
            await trio.lowlevel.checkpoint()
            done = sum(target.data[at] != 0 for at in range(0, SIZE, CLUSTER))
            assert job.current_progress <= done * CLUSTER
        assert await rig.finish(job) is None


# -- the end, and pauses ---------------------------------------------------------------------------


@pytest.mark.parametrize("guest_first", [True, False])
async def test_a_cancel_lets_guests_go_while_threads_hang(
    source: SteppedDriver, target: SteppedDriver, *, guest_first: bool
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        rig.source.bitmaps.recent.append((0, SIZE))
        bitmap.disable()
        with source.hold("read"):
            job = rig.job(Sync.BITMAP, "b", BitmapMode.ALWAYS)
            await rig.start(job)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as guests:
                guests.start_soon(rig.source.write, 0, memoryview(b"new"))
                if guest_first:
                    await wait_all_tasks_blocked()
                job.request_cancel()
        await rig.finish(job)
        # What the thread read then is new, and the bitmap did not see the guest's write.
        assert {0, CLUSTER} <= rig.dirty_bytes(bitmap)


async def test_a_cancelled_job_waits_for_one_step_of_each_thread(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    async with open_rig(source, target) as rig:
        with target.hold("write"):
            job = rig.job(Sync.FULL)
            await rig.start(job)
            await wait_all_tasks_blocked()
            job.request_cancel()
            await wait_all_tasks_blocked()
        await rig.finish(job)
    assert target.counts["write"] == 3


async def test_guests_go_on_after_ten_seconds_without_room_while_threads_hang(
    source: SteppedDriver, target: SteppedDriver, autojump_clock: MockClock
) -> None:
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        with target.hold("write"):
            job = rig.job(Sync.FULL)
            await rig.start(job)
            await wait_all_tasks_blocked()
            began = trio.current_time()
            # Four threads have buffers for two clusters each, and there is room for four more.
            for cluster in range(21):
                await rig.source.write(cluster * CLUSTER, memoryview(b"new"))
            assert trio.current_time() - began == limits.GUEST_WAIT_FOR_COPY_SECONDS
        assert str(await rig.finish(job)).startswith("The target took nothing")


async def test_a_pause_is_complete_when_the_threads_have_ended_a_step(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    async with open_rig(source, target) as rig:
        with target.hold("write"):
            job = rig.job(Sync.FULL)
            await rig.start(job)
            await wait_all_tasks_blocked()
            job.pause()
            await wait_all_tasks_blocked()
            assert (job.status, job.busy) == ("running", True)
        await wait_all_tasks_blocked()
        assert (job.status, job.busy) == ("paused", False)
        assert job.current_progress == 3 * 2 * CLUSTER
        job.resume()
        assert await rig.finish(job) is None
    assert target.data == OLD
    assert source.read_once()


async def test_a_speed_that_is_set_holds_after_a_step(
    source: SteppedDriver,
    target: SteppedDriver,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "BACKUP_WORKERS", 1)
    async with open_rig(source, target) as rig:
        with target.hold("write"):
            job = rig.job(Sync.FULL)
            await rig.start(job)
            await wait_all_tasks_blocked()
            job.set_speed(CLUSTER)
            began = trio.current_time()
        assert await rig.finish(job) is None
        # Of 20.5 clusters, 2 were swept, and nobody waits for what comes last: 2 more.
        assert trio.current_time() - began == pytest.approx(16.5)
    assert target.threads == 1
    assert target.data == OLD


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP])
@pytest.mark.parametrize("cluster", [6, 20])
@pytest.mark.parametrize("operation", ["read", "write"])
async def test_an_error_in_a_thread_meets_the_users_policy(
    source: SteppedDriver, target: SteppedDriver, operation: str, policy: OnError, cluster: int
) -> None:
    sick = source if operation == "read" else target
    sick.bad = range(cluster * CLUSTER, (cluster + 1) * CLUSTER)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, on_errors=OnErrors(source=policy, target=policy))
        before = await rig.start(job)
        if policy is OnError.STOP:
            await wait_all_tasks_blocked()
            assert job.status is Status.PAUSED
            sick.bad = range(0)
            for each in range(21):
                await rig.source.write(each * CLUSTER, memoryview(b"new"))
            job.resume()
        error = await rig.finish(job)
        (announced,) = rig.named("BLOCK_JOB_ERROR")
    assert announced == {"device": "j", "operation": operation, "action": policy.value}
    assert error == ("Input/output error" if policy is OnError.REPORT else None)
    if error is None:
        good = [at for at in range(SIZE) if at not in sick.bad]
        assert all(target.durable[at] == before[at] for at in good)


async def test_threads_that_fail_together_stop_the_job_once(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    target.bad = range(SIZE)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, on_errors=OnErrors(target=OnError.STOP))
        before = await rig.start(job)
        for _ in range(2):
            await wait_all_tasks_blocked()
            assert (job.status, job.io_status) == ("paused", "failed")
            # The first steps are in the threads' buffers.
            for cluster in (0, 1, 8, 9, 16, 17):
                await rig.source.write(cluster * CLUSTER, memoryview(b"new"))
            job.resume()
        await wait_all_tasks_blocked()
        target.bad = range(0)
        job.resume()
        assert await rig.finish(job) is None
        assert len(rig.named("BLOCK_JOB_ERROR")) == 3
    assert target.data == before


async def test_a_step_that_could_not_be_written_stays_dirty_though_a_guest_went_on(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    target.bad = range(SIZE)
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        rig.source.bitmaps.recent.append((0, SIZE))
        bitmap.disable()
        with target.hold("write"):
            job = rig.job(Sync.BITMAP, "b", BitmapMode.ALWAYS)
            await rig.start(job)
            await wait_all_tasks_blocked()
            await rig.source.write(0, memoryview(b"n" * 2 * CLUSTER))
        assert await rig.finish(job) == "Input/output error"
        assert rig.dirty_bytes(bitmap) == set(range(SIZE))


# -- others who look at the target -----------------------------------------------------------------


async def test_a_bitmap_of_the_target_records_what_threads_write(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    async with open_rig(source, target) as rig:
        bitmap = rig.target.bitmaps.add("t", CLUSTER)
        assert await rig.copy(Sync.FULL) is None
        assert bitmap.count_bytes == 21 * CLUSTER
    assert target.threads == 3


async def test_the_target_is_not_quiet_while_a_thread_writes(
    source: SteppedDriver, target: SteppedDriver
) -> None:
    async with open_rig(source, target) as rig, trio.open_nursery() as nursery:
        quiet = trio.Event()

        async def quiesce() -> None:
            async with rig.target.quiesced():
                quiet.set()

        with target.hold("write"):
            job = rig.job(Sync.FULL)
            await rig.start(job)
            await wait_all_tasks_blocked()
            nursery.start_soon(quiesce)
            await wait_all_tasks_blocked()
            assert not quiet.is_set()
        assert await rig.finish(job) is None
    assert target.data == OLD
