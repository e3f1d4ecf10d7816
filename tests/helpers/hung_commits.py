"""Transactions that hang, as on a disk that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockd import limits


class HungCommits:
    """Holds up all transactions while ``hung``; ``before`` is to be called before each."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()

    def before(self) -> None:
        self._go.wait()

    @contextmanager
    def hung(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """And nobody waits for them for long."""
        self._go.clear()
        try:
            with monkeypatch.context() as patched:
                patched.setattr(limits, "STATE_KEEP_SECONDS", 0)
                yield
        finally:
            self._go.set()
