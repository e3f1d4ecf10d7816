"""System calls that wait for the test while a worker thread is in them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import trio

from tests.helpers.patience import PATIENCE_SECONDS


class SlowCall:
    """Stands for ``real``: each call waits for its ``release``; it is for worker threads only."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self._turns = threading.Semaphore(0)
        self._began = threading.Semaphore(0)
        self._fail_with: list[OSError] = []
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        self._began.release()
        assert self._turns.acquire(timeout=PATIENCE_SECONDS)
        if self._fail_with:
            raise self._fail_with.pop(0)
        return self._real(*args)

    async def wait_begun(self) -> None:
        """Return once a call, one that nobody has waited for yet, has begun."""

        def wait() -> None:
            assert self._began.acquire(timeout=PATIENCE_SECONDS)

        await trio.to_thread.run_sync(wait)

    def release(self, count: int = 1) -> None:
        """Let so many calls do their work, now or when they come."""
        self._turns.release(count)

    def fail(self, error: OSError) -> None:
        """Let one call raise ``error``, now or when it comes."""
        self._fail_with.append(error)
        self._turns.release()
