"""Requests in flight: the gate that quiesces a node, and ranges reserved for read-modify-write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from blockd.extent import Extent


class Gate:
    """Counts the requests inside and keeps new ones out while it is closed.

    ``closed`` may be asked by the nowait path: a request that never waits needs no count, for
    nothing can happen in the middle of it.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        """``on_change`` is called whenever ``closed`` may have changed."""
        self._on_change = on_change
        self._inside = 0
        self._closings = 0
        self._opened = trio.Event()
        self._emptied = trio.Event()

    @property
    def closed(self) -> bool:
        return self._closings > 0

    async def enter(self) -> None:
        while self._closings:
            await self._opened.wait()
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._emptied.set()
            self._emptied = trio.Event()

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """Keep new requests out; the body runs once all that were inside have left."""
        self._closings += 1
        self._on_change()
        try:
            while self._inside:
                await self._emptied.wait()
            yield
        finally:
            self._closings -= 1
            if not self._closings:
                self._opened.set()
                self._opened = trio.Event()
            self._on_change()


class Reservations:
    """Ranges of which each byte has one owner at a time."""

    def __init__(self) -> None:
        self._held: dict[Extent, trio.Event] = {}

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    @asynccontextmanager
    async def reserve(self, wanted: Extent) -> AsyncIterator[None]:
        """Wait until nobody else holds a byte of ``wanted``, then hold it."""
        while (released := self._conflict(wanted)) is not None:
            await released.wait()
        self._held[wanted] = trio.Event()
        try:
            yield
        finally:
            self._held.pop(wanted).set()

    def _conflict(self, wanted: Extent) -> trio.Event | None:
        for held, released in self._held.items():
            if held.offset < wanted.end and wanted.offset < held.end:
                return released
        return None
