"""Threads that copy many clusters in one go, and guests that come across them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.backup import BitmapMode, OnErrors, Sync
from blockd.backup.sweep import Sweep, Swept
from blockd.block import Descriptor
from blockd.job import OnError, Status
from tests.helpers.backup_rig import CLUSTER, open_rig, pattern, use_small_limits
from tests.helpers.threaded_memory import ThreadedMemory

OLD = pattern(20, 512)
SIZE = len(OLD)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_limits(monkeypatch)


# -- one sweep, step by step -----------------------------------------------------------------------


class Disk:
    """A descriptor that notes what is done, and lets the test look in before each step."""

    def __init__(self) -> None:
        self.done: list[int] = []
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
        pass


class Copy:
    """A sweep over the clusters 4 to 10, two at a time, run in the test's own thread."""

    def __init__(self) -> None:
        self.source, self.target = Disk(), Disk()
        self.sweep = Sweep(4, 10, lambda first, end: (end - first) * CLUSTER, shift=10, step=2)

    def run(self) -> Swept:
        source, target = cast(Descriptor, self.source), cast(Descriptor, self.target)
        return self.sweep.copy(source, target, memoryview(bytearray(2 * CLUSTER)))


async def test_a_sweep_copies_in_steps() -> None:
    copy = Copy()
    assert copy.run() == Swept(4, 10, 10)
    assert copy.source.done == copy.target.done == [4, 5, 6, 7, 8, 9]


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
    assert copy.run() == Swept(4, end, end)
    assert copy.target.done == list(range(4, end))


async def test_a_sweep_of_which_all_is_taken_does_nothing() -> None:
    copy = Copy()
    assert copy.sweep.take_from(4)
    assert copy.run() == Swept(4, 4, 4)
    assert copy.source.done == []


async def test_a_sweep_ends_where_the_source_fails() -> None:
    copy = Copy()
    copy.source.fails_at = 6
    assert copy.run() == Swept(4, 6, 6)


async def test_a_sweep_ends_where_the_target_fails() -> None:
    copy = Copy()
    copy.target.fails_at = 6
    assert copy.run() == Swept(4, 6, 8)


async def test_who_waits_for_a_read_is_woken() -> None:
    copy = Copy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy.sweep.wait_read, 5)
        await wait_all_tasks_blocked()
        copy.run()
    await copy.sweep.wait_read(5)


# -- guests and threads ----------------------------------------------------------------------------


async def test_threads_back_up_all() -> None:
    source, target = ThreadedMemory(OLD), ThreadedMemory(SIZE)
    async with open_rig(source, target) as rig:
        assert await rig.copy(Sync.FULL) is None
        (end,) = rig.named("BLOCK_JOB_COMPLETED")
    assert target.durable == OLD
    assert end["len"] == end["offset"] == 21 * CLUSTER


async def test_a_guest_never_waits_for_threads_that_hang_in_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HELD_BYTES_LIMIT", 32 * CLUSTER)
    source, target = ThreadedMemory(OLD), ThreadedMemory(SIZE)
    source.nowait = lambda _: True
    async with open_rig(source, target) as rig:
        with target.hold_threads("write") as hold:
            job = rig.job(Sync.FULL)
            before = await rig.start(job)
            # All is claimed: 21 clusters by 8. Each thread has read a step of its sweep.
            await hold.reached_by(3)
            for cluster in range(21):
                rig.source.write_nowait(cluster * CLUSTER, memoryview(b"new"))
        assert await rig.finish(job) is None
    assert target.data == before


async def test_a_guest_waits_for_a_step_that_is_being_read() -> None:
    source, target = ThreadedMemory(OLD), ThreadedMemory(SIZE)
    async with open_rig(source, target) as rig, trio.open_nursery() as guests:
        with source.hold_threads("read") as hold:
            job = rig.job(Sync.FULL)
            before = await rig.start(job)
            await hold.reached_by(3)
            for cluster in (0, 1):
                guests.start_soon(rig.source.write, cluster * CLUSTER, memoryview(b"new"))
            await wait_all_tasks_blocked()
            assert source.data == before
        assert await rig.finish(job) is None
    assert target.data == before
    assert source.data[:3] == b"new"


@pytest.mark.parametrize("guest_first", [True, False])
async def test_a_cancel_lets_guests_go_while_threads_hang(*, guest_first: bool) -> None:
    source, target = ThreadedMemory(OLD), ThreadedMemory(SIZE)
    async with open_rig(source, target) as rig:
        bitmap = rig.add_bitmap()
        rig.source.bitmaps.recent.append((0, SIZE))
        bitmap.disable()
        with source.hold_threads("read") as hold:
            job = rig.job(Sync.BITMAP, "b", BitmapMode.ALWAYS)
            await rig.start(job)
            await hold.reached_by(3)
            async with trio.open_nursery() as guests:
                guests.start_soon(rig.source.write, 0, memoryview(b"new"))
                if guest_first:
                    await wait_all_tasks_blocked()
                job.request_cancel()
        await rig.finish(job)
        # What the thread read then may be new, and the bitmap did not see the guest's write.
        assert {0, CLUSTER} <= rig.dirty_bytes(bitmap)


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP])
@pytest.mark.parametrize("operation", ["read", "write"])
async def test_an_error_in_a_thread_meets_the_users_policy(operation: str, policy: OnError) -> None:
    source, target = ThreadedMemory(OLD), ThreadedMemory(SIZE)
    sick = source if operation == "read" else target
    sick.bad = range(6 * CLUSTER, 7 * CLUSTER)
    async with open_rig(source, target) as rig:
        job = rig.job(Sync.FULL, on_errors=OnErrors(source=policy, target=policy))
        await rig.start(job)
        if policy is OnError.STOP:
            while job.status is not Status.PAUSED or job.busy:
                await trio.lowlevel.checkpoint()
            sick.bad = range(0)
            job.resume()
        error = await rig.finish(job)
        (announced,) = rig.named("BLOCK_JOB_ERROR")
    assert announced == {"device": "j", "operation": operation, "action": policy.value}
    assert error == ("Input/output error" if policy is OnError.REPORT else None)
    if error is None:
        good = [at for at in range(SIZE) if at not in sick.bad]
        assert all(target.durable[at] == OLD[at] for at in good)
