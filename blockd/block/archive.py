"""Where the daemon keeps bitmaps of nodes, whatever their images can keep themselves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import trio

from blockd.block.node import Node
from blockd.errors import BlockdError


@dataclass(eq=False, slots=True)
class Coming:
    """A persistent bitmap that is about to be added, by somebody who can't take that back."""

    name: str
    granularity_bytes: int
    #: Whether it has been, or will not be.
    over: bool = False


class Archive(Protocol):
    """What outlives the daemon, as the graph and the commands use it (``StateDirectory``)."""

    #: Whether anything does.
    keeps_any: bool

    def check_persistent(self, node: Node) -> None:
        """Raise ``BlockdError`` where no bitmap of this node can be kept."""

    async def look_at(self, file: Node) -> None:
        """A node is being opened over ``file``, which it may write to before it is attached."""

    async def opening_ended(self) -> None:
        """What was looked at has been attached, or will not be."""

    async def attach(self, node: Node) -> None:
        """Give a node that has just been opened the bitmaps which its image had."""

    async def expect(self, node: Node, coming: Coming) -> bool:
        """Return once such a bitmap, when it has been added, can't get lost, even if ``keep``
        fails then. ``keep`` is to be called when it is ``over``.

        False where nothing can be stored: it should not be added.
        """
        ...

    async def keep(self, node: Node) -> bool:
        """Return once its bitmaps, which a command or a job has changed, are durable.

        False where that failed, or takes too long; administrators have heard of it.
        """
        ...

    async def settle(self, node: Node) -> None:
        """A node has become read-only: whoever writes to its image from now on is another."""

    def closing(self, node: Node) -> AbstractAsyncContextManager[None]:
        """The body closes the node's driver: nothing writes to the node any more."""
        ...

    async def record_job(self, job_id: str, facts: Mapping[str, str]) -> None:
        """Keep what an administrator should know of a job if the daemon dies."""

    async def forget_job(self, job_id: str) -> None:
        """The job has ended."""


class NoArchive:
    """Nothing is kept."""

    keeps_any = False

    def check_persistent(self, node: Node) -> None:
        raise BlockdError(
            f"Can't store persistent bitmaps to {node.name}: Operation not supported: "
            "start blockd with --state-dir"
        )

    async def look_at(self, file: Node) -> None:
        await trio.lowlevel.checkpoint()

    async def opening_ended(self) -> None:
        await trio.lowlevel.checkpoint()

    async def attach(self, node: Node) -> None:
        await trio.lowlevel.checkpoint()

    async def expect(self, node: Node, coming: Coming) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def keep(self, node: Node) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def settle(self, node: Node) -> None:
        await trio.lowlevel.checkpoint()

    def closing(self, node: Node) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def record_job(self, job_id: str, facts: Mapping[str, str]) -> None:
        await trio.lowlevel.checkpoint()

    async def forget_job(self, job_id: str) -> None:
        await trio.lowlevel.checkpoint()
