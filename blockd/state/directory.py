"""A state directory, as the daemon sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from blockd.bitmap import DirtyBitmap
from blockd.block import Node


class Listener(Protocol):
    """Who hears what administrators should know. No call waits, or raises."""

    def bitmap_recovered(self, node: Node, bitmap: DirtyBitmap) -> None:
        """A bitmap came back other than it should be: see its ``reason``."""

    def storing_failed(self, node: Node, reason: str) -> None:
        """After a crash from now on, the node's persistent bitmaps would come back all dirty."""

    def storing_resumed(self, node: Node) -> None:
        """What ``storing_failed`` said is over."""


class StateDirectory(Protocol):
    """Keeps the persistent bitmaps of nodes; one daemon has it at a time.

    ``await StateDirectory.open(path, nursery, listener)`` makes or opens one; ``BlockdError``
    where another daemon has it, where a newer blockd made it, or where it can't be used at all.
    ``nursery`` is for its background work, which ends with ``close``.
    """

    def check_persistent(self, node: Node) -> None:
        """Raise ``BlockdError`` where the node's image could not be recognised again."""

    async def attach(self, node: Node) -> None:
        """Give a node that has just been opened the bitmaps which its image had.

        They are in ``node.bitmaps`` on return, and the node has its journal where there are any.
        Nothing about the state keeps a disk from opening: a bitmap whose bits are lost, or may
        not be trusted, is all dirty, or inconsistent, with its ``reason`` set, and ``listener``
        has heard of it. Nothing happens for nodes that could not be recognised.
        """

    async def keep(self, node: Node) -> None:
        """Return once the persistent bitmaps are durable as they are now.

        To be called after every change of a bitmap that is not a guest write: added (the node
        gets its journal with the first), removed, cleared, merged, enabled, disabled, abdicated,
        resized. It gives up waiting after ``STATE_KEEP_SECONDS``, and where storing fails;
        ``listener`` has heard of that. Does nothing for nodes without such bitmaps, ever.
        """

    def closing(self, node: Node) -> AbstractAsyncContextManager[None]:
        """The body closes the node's driver: nothing writes to the node any more.

        Before it the bitmaps are stored for the last time; after it the image is recorded as it
        then is, as closed cleanly. A body that raises leaves it recorded as open, which means a
        recovery when it is opened again.
        """

    async def record_job(self, job_id: str, facts: Mapping[str, str]) -> None:
        """Keep what an administrator should know of a job if the daemon dies.

        As bounded as ``keep``.
        """

    async def forget_job(self, job_id: str) -> None:
        """The job has ended; as bounded as ``keep``."""

    @property
    def unfinished_jobs(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """The jobs that a daemon before this one left behind, told once: at the next opening
        they are gone.
        """

    async def close(self) -> None:
        """End the background work and let go of the directory. All nodes are closed."""
