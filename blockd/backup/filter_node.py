"""The node by which a user who names it sees that a backup keeps a node's old data."""

from __future__ import annotations

from blockd.block import Node, RawDriver


class FilterDriver(RawDriver):
    """Stands over ``source`` in the queries.

    The old data is kept by a hook of the source itself, so that nobody can write past it; nothing
    is read or written here, and nothing is there to be flushed.
    """

    name = "copy-before-write"

    def __init__(self, source: Node) -> None:
        super().__init__(source)
        self.filename = source.driver.filename

    async def flush(self) -> None:
        """The source is flushed by those who write to it."""
