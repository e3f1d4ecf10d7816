"""A journal in memory that logs what it is asked, and can keep writes waiting."""

from __future__ import annotations

import trio


class FakeJournal:
    """``log`` may be shared with a driver's ``on_begin``, to show the order.

    ``at_once``: whether writes that can't wait are noted. ``ready``: what the others wait for.
    """

    def __init__(self, log: list[str] | None = None, *, at_once: bool = True) -> None:
        self.log: list[str] = [] if log is None else log
        self.noted: list[tuple[int, int]] = []
        self.at_once = at_once
        self.ready = trio.Event()
        self.ready.set()

    def note_nowait(self, offset: int, length: int) -> bool:
        if self.at_once:
            self._note(offset, length)
        return self.at_once

    async def note(self, offset: int, length: int) -> None:
        await self.ready.wait()
        self._note(offset, length)

    def _note(self, offset: int, length: int) -> None:
        self.log.append("note")
        self.noted.append((offset, length))
