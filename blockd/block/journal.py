"""What must hear of a node's writes before they happen, so that its bitmaps outlive the daemon."""

from __future__ import annotations

from typing import Protocol


class Journal(Protocol):
    """The record of where a node is written to, as its writes use it.

    Whatever becomes of the record, the guest keeps its disk: neither call fails for it.
    """

    def note_nowait(self, offset: int, length: int) -> bool:
        """Note a write that is about to be done, or return False: it has to wait for ``note``."""
        ...

    async def note(self, offset: int, length: int) -> None:
        """Note a write that is about to be done, once the storage is ready for that.

        The note is taken in the step in which this returns: where an instant falls between two
        writes, for the bitmaps, it falls there for the journal too.
        """
        ...
