"""A scripted driver that shows its test what reaches it, and when."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from tests.helpers.memory_driver import MemoryDriver

#: Whether requests finish at once, each as likely as the others.
ANSWERS = {"inline": [True], "waiting": [False], "now and then": [True, True, False]}


class WatchedDriver(MemoryDriver):
    """``seen``: the operations that reached the driver, in order, inline ones too.

    ``on_begin`` is called with each one's name before it takes effect.
    """

    def __init__(self, content: bytes | int, *, read_only: bool = False) -> None:
        super().__init__(content, read_only=read_only)
        self.seen: list[str] = []
        self.on_begin: Callable[[str], None] = lambda _: None
        self._began = trio.Event()

    def answer(self, how: str) -> None:
        """Take requests ``how`` of ``ANSWERS`` says: which ones at once, by a fixed lot."""
        lot = random.Random(7)
        self.nowait = lambda _: lot.choice(ANSWERS[how])

    async def wait_seen(self, operation: str, count: int) -> None:
        """Return once the driver has been asked for so many operations of that name."""
        while self.counts[operation] < count:
            await self._began.wait()

    def _count(self, operation: str) -> int:
        count = super()._count(operation)
        self.seen.append(operation)
        self.on_begin(operation)
        self._began.set()
        self._began = trio.Event()
        return count
