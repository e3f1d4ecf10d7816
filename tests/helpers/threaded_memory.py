"""A memory driver whose bytes worker threads reach too, as they reach a file's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import trio

from blockd.block import Descriptor
from tests.helpers.memory_driver import MemoryDriver


class ThreadHold:
    """Threads wait before an operation until ``release``."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.waiting = 0
        self._released = threading.Event()

    async def reached_by(self, count: int) -> None:
        """Return when so many threads wait."""
        while self.waiting < count:
            await trio.lowlevel.checkpoint()

    def arrive(self) -> None:
        self.waiting += 1

    def wait(self) -> None:
        self._released.wait()

    def release(self) -> None:
        self._released.set()


class ThreadedMemory(MemoryDriver):
    """Has a descriptor. Only for the real clock: a mock one jumps while threads work.

    What a thread does takes effect on the loop, in one step, and ``delay`` gives tasks their
    turns before it, so threads and tasks meet in many orders without anybody sleeping.
    """

    def __init__(self, content: bytes | bytearray | int) -> None:
        super().__init__(content)
        self._thread_hold: ThreadHold | None = None

    @contextmanager
    def hold_threads(self, operation: str) -> Iterator[ThreadHold]:
        """Let threads wait, at the most until the end of the body."""
        self._thread_hold = ThreadHold(operation)
        try:
            yield self._thread_hold
        finally:
            self._thread_hold.release()

    def descriptor(self, *, write: bool) -> Descriptor:
        return cast(Descriptor, MemoryDescriptor(self, trio.lowlevel.current_trio_token()))

    def thread_hold(self, operation: str) -> ThreadHold | None:
        hold = self._thread_hold
        return hold if hold is not None and hold.operation == operation else None

    def read_now(self, offset: int, view: memoryview) -> None:
        self._fill(self._count("read"), offset, view)

    def write_now(self, offset: int, view: memoryview) -> None:
        self._change("write", self._count("write"), offset, bytes(view))


class MemoryDescriptor:
    """What of ``Descriptor`` a thread uses."""

    def __init__(self, driver: ThreadedMemory, token: trio.lowlevel.TrioToken) -> None:
        self._driver = driver
        self._token = token

    def read(self, offset: int, view: memoryview) -> None:
        self._wait("read")
        self._on_loop(lambda: self._driver.read_now(offset, view))

    def write(self, offset: int, view: memoryview) -> None:
        self._wait("write")
        self._on_loop(lambda: self._driver.write_now(offset, view))

    def begin_writeback(self, offset: int, length: int) -> None:
        assert offset >= 0
        assert length >= 0

    def _wait(self, operation: str) -> None:
        hold = self._driver.thread_hold(operation)
        if hold is not None:
            self._on_loop(hold.arrive)
            hold.wait()
        for _ in range(self._driver.delay(operation)):
            self._on_loop(lambda: None)

    def _on_loop(self, call: Callable[[], None]) -> None:
        trio.from_thread.run_sync(call, trio_token=self._token)
