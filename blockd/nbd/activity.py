"""How many connections have something to do: spinning pays only for a single busy one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """Counts the connections that are not waiting for their client."""

    def __init__(self) -> None:
        self._busy = 0

    @property
    def alone(self) -> bool:
        """Whether the one that asks is the only busy connection."""
        return self._busy <= 1

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A connection is there."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """It waits for its client meanwhile."""
        self._busy -= 1
        try:
            yield
        finally:
            self._busy += 1
