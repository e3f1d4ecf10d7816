"""Marks files, while bitmaps can't be stored and all else can: not one more with each attempt."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import Node
from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import DATA, GRANULE, SIZE, Daemon, daemon, dirty, make_image

ALL = set(range(SIZE // GRANULE))


class Attempts:
    """At each attempt to store the bitmap one commit fails; all commits after it do not."""

    def __init__(self, failing: int) -> None:
        self._failing = failing
        self._numbers: Iterator[int] = iter(())

    def begin(self) -> None:
        self._numbers = count()

    def before_commit(self) -> None:
        if next(self._numbers, None) == self._failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


each_commit = pytest.mark.parametrize(
    "failing", [pytest.param(1, id="the pieces"), pytest.param(2, id="that they count")]
)


@dataclass
class Failing:
    """A daemon whose attempts to store the bitmap of its node fail."""

    one: Daemon
    node: Node
    disk: SimulatedDisk
    attempts: Attempts
    written: set[int] = field(default_factory=set)

    async def attempt(self) -> None:
        self.attempts.begin()
        with pytest.raises(OSError, match="No space"):
            await self.one.checkpoint(self.node)
        await self.write()

    async def write(self) -> None:
        granule = len(self.written)
        await self.node.write(granule * GRANULE, DATA)
        self.written.add(granule)

    def after_kill(self) -> AbstractAsyncContextManager[Daemon]:
        return daemon(self.one.after_kill(), self.one.image, disk=self.disk.after_kill())


@asynccontextmanager
async def failing_daemon(directory: Path, failing: int) -> AsyncIterator[Failing]:
    image, disk = make_image(directory / "disk.img"), SimulatedDisk()
    attempts = Attempts(failing)
    before = attempts.before_commit
    async with daemon(directory / "state", image, disk=disk, before_commit=before) as one:
        stuck = Failing(one, await one.node(), disk, attempts)
        await one.add(stuck.node)
        await stuck.write()
        yield stuck


@each_commit
async def test_there_are_no_more_than_so_many(tmp_path: Path, failing: int) -> None:
    async with failing_daemon(tmp_path, failing) as stuck:
        most = 0
        for _ in range(3 * limits.STATE_EPOCHS):
            await stuck.attempt()
            most = max(most, len(stuck.disk.names()))
        heard = stuck.one.heard
        # With the heartbeat.
        assert most <= limits.STATE_EPOCHS + 2
        assert len(stuck.disk.names()) == 2
        assert heard.failed == ["No space left on device"]
        async with stuck.after_kill() as two:
            assert dirty(await two.node()) == ALL
            assert two.heard.recovered == [("b", "state-damaged")]
        await stuck.one.checkpoint(stuck.node)
        assert heard.resumed == 1
        async with stuck.after_kill() as two:
            assert dirty(await two.node()) == stuck.written
            assert two.heard.recovered == []


@each_commit
async def test_up_to_then_nothing_is_lost(tmp_path: Path, failing: int) -> None:
    async with failing_daemon(tmp_path, failing) as stuck:
        for _ in range(limits.STATE_EPOCHS - 1):
            await stuck.attempt()
        assert stuck.one.heard.failed == []
        async with stuck.after_kill() as two:
            assert dirty(await two.node()) == stuck.written
            assert two.heard.recovered == []


@each_commit
async def test_nor_do_pieces_pile_up(tmp_path: Path, failing: int) -> None:
    async with failing_daemon(tmp_path, failing) as stuck:
        for _ in range(4):
            await stuck.attempt()
        pieces = await stuck.one.state.commits.read(lambda database: database.piece_rows())
        assert len(pieces) <= 1
