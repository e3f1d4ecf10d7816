"""What could not be stored of an image: it is said durably ("poison"), and told."""

from __future__ import annotations

import logging

import trio

from blockd.block import Node
from blockd.state import marks
from blockd.state.environment import Environment

_log = logging.getLogger(__name__)


class Losses:
    """The epochs of one image of which what is stored and marked is not all."""

    def __init__(self, environment: Environment, node: Node, image_row: int) -> None:
        self._environment = environment
        self._node = node
        self._image_row = image_row
        #: Whether a crash would leave all dirty, and listeners know.
        self.failed = False
        #: The latest epoch that is poisoned.
        self._latest = 0
        #: Those where that is not durable yet.
        self._to_poison: set[int] = set()

    async def poison(self, epoch: int, error: OSError) -> None:
        """Because of ``error``, not all of the epoch is to be relied on. Never raises."""
        self._to_poison.add(epoch)
        self._latest = max(self._latest, epoch)
        if not self.failed:
            self.failed = True
            self._environment.listener.storing_failed(self._node, str(error.strerror or error))
        try:
            await self.record()
        except OSError as second:
            _log.critical(
                "node '%s': its bitmaps can't be kept, nor can that be recorded: %s; %s. If the "
                "daemon is killed now, do a full backup",
                self._node.name,
                error,
                second,
            )

    async def record(self) -> None:
        """Make it durable, as far as it is not. Raises ``OSError``."""
        for number in tuple(self._to_poison):
            name = marks.marks_name(self._image_row, number)
            await trio.to_thread.run_sync(marks.poison, self._environment.disk, name)
            self._to_poison.discard(number)

    def stored(self, since: int) -> None:
        """All bitmaps are stored as they were in epoch ``since``, or later."""
        if self.failed and since > self._latest:
            self.failed = False
            self._environment.listener.storing_resumed(self._node)
