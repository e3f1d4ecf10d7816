"""A memory driver whose bytes threads reach by a descriptor, though only in turns with the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import trio

from blockd.block import Descriptor, WriteBy
from tests.helpers.memory_descriptor import memory_descriptor
from tests.helpers.memory_driver import Hold, MemoryDriver


class SteppedDriver(MemoryDriver):
    """Each thread stops before and after all it does, and the loop stands still while it runs.

    So a run is the same each time, and a mock clock may be used. What threads do counts as
    ``read`` and ``write``, with their holds and faults. ``delay`` is asked for "thread" at each
    stop: how many turns the scheduler gets until the thread goes on.
    """

    def __init__(self, content: bytes | bytearray | int) -> None:
        super().__init__(content)
        #: How many threads were asked for.
        self.threads = 0

    def read_once(self) -> bool:
        """Whether no byte was read twice."""
        reads = sorted(self.reads, key=lambda each: each.offset)
        return all(each.end <= after.offset for each, after in pairwise(reads))

    def descriptor(self) -> Descriptor:
        return memory_descriptor(self)

    @property
    def takes_write_by(self) -> bool:
        return True

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        self.threads += 1
        results: list[int] = []
        end = offset + length
        thread = _Thread(lambda: results.append(call(memory_descriptor(self), end)))
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            while True:
                for _ in range(1 + self.delay("thread")):
                    await trio.lowlevel.checkpoint()
                if not thread.step():
                    break
                if thread.hold is not None:
                    await thread.hold.wait()
        if thread.error is not None:
            raise thread.error
        return results[0]

    def read_now(self, offset: int, view: memoryview) -> None:
        thread = _this_thread()
        thread.stop()
        count = self._count("read")
        thread.stop_at(self.find_hold("read", count))
        self._fill(count, offset, view)
        thread.stop()

    def write_now(self, offset: int, view: memoryview) -> None:
        thread = _this_thread()
        thread.stop()
        count = self._count("write")
        thread.stop_at(self.find_hold("write", count))
        self._change("write", count, offset, bytes(view))
        thread.stop()


class _Thread(threading.Thread):
    """Runs while the loop is in ``step``; it stops in ``stop``, or ends."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._ended = False
        #: The loop waits for this before the next step.
        self.hold: Hold | None = None
        self.error: BaseException | None = None
        self.start()

    def step(self) -> bool:
        """Let the thread go on to its next stop; False where it has ended."""
        self.hold = None
        self._go.release()
        self._stopped.acquire()
        return not self._ended

    def run(self) -> None:
        self._go.acquire()
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - whoever asked for the thread raises it
            self.error = error
        self._ended = True
        self._stopped.release()

    def stop(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def stop_at(self, hold: Hold | None) -> None:
        if hold is not None:
            self.hold = hold
            self.stop()


def _this_thread() -> _Thread:
    thread = threading.current_thread()
    assert isinstance(thread, _Thread)
    return thread
