"""Whether a task that always has more to do lets the others in."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from blockd import limits


@asynccontextmanager
async def counted_turns(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], int]]:
    """Tells how many turns another task has had since the body began.

    Meanwhile each look at the clock finds another quarter of a connection's slice gone.
    """
    ticks = itertools.count()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: next(ticks) * limits.NBD_SLICE_SECONDS / 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            yield lambda: turns
            nursery.cancel_scope.cancel()
