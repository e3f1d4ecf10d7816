"""What a point-in-time view has of a node: the word before each write, and the readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from blockd.block.allocation import Allocation


class BeforeWrite(Protocol):
    """A point-in-time view's hook: it keeps what a write is about to overwrite."""

    def before_write_nowait(self, offset: int, length: int) -> bool:
        """Whether the range's old data is safe already; False sends the write the async way."""
        ...

    async def before_write(self, offset: int, length: int) -> None:
        """Return once the range's old data is safe, or once this view has given up on it.

        An ``OSError`` fails the write: for a view that may not be lost.
        """
        ...


class ReadView(Protocol):
    """What readers of a node get in place of what its driver has; as ``Driver`` defines it."""

    async def read(self, offset: int, view: memoryview) -> None: ...
    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]: ...
