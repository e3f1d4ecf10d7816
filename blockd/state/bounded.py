"""Work on a state directory that may hang: whoever waits for it does so for a time only."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from blockd import limits

_log = logging.getLogger(__name__)


class Bounded:
    """Does things in ``nursery``, where they go on when nobody waits for them any more."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def do(self, work: Callable[[], Awaitable[None]], seconds: float | None = None) -> bool:
        """Whether ``work`` was done in time, and did not fail. It is not cut off.

        ``seconds`` None: ``STATE_KEEP_SECONDS``.
        """
        ended = trio.Event()
        done = False

        async def run() -> None:
            nonlocal done
            try:
                await work()
                done = True
            except OSError as error:
                _log.error("the state directory can't be written to: %s", error)
            finally:
                ended.set()

        self._nursery.start_soon(run)
        with trio.move_on_after(limits.STATE_KEEP_SECONDS if seconds is None else seconds):
            await ended.wait()
        return done
