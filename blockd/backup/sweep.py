"""One hop to a worker thread that copies many clusters, and lets go of them when a guest comes.

A hop costs as much as copying half a mebibyte, so a thread takes a long run of clusters; and it
copies them in steps that stay in the processor's cache. But a guest must never wait for the
target, which may hang. So a guest that wants to write to a cluster which the thread has not begun
takes it away, with all behind it; and a cluster that has been read is the guest's at once. Nor does
a pause, a speed that is set or a cancel wait for more than the step which the thread is at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import trio

from blockd.block import Descriptor


@dataclass(frozen=True, slots=True)
class Swept:
    """How far a sweep came from ``first`` on: up to ``written_end`` the target has it.

    What was read beyond, up to ``read_end``, is in the buffer: writing it failed. What was begun
    beyond, up to ``begun_end``, could not be read.
    """

    first: int
    written_end: int
    read_end: int
    begun_end: int


class Sweep:
    """Copies clusters from ``first`` up to an end that may come nearer."""

    def __init__(
        self,
        first: int,
        end: int,
        length: Callable[[int, int], int],
        *,
        shift: int,
        step: int,
        unwanted: Callable[[], bool],
    ) -> None:
        """``length``: the bytes of a range of clusters. ``step``: clusters copied at a time.

        ``unwanted`` is asked in the thread before each step: whether to stop there.
        """
        self._length = length
        self._shift = shift
        self._step = step
        self._unwanted = unwanted
        self._lock = threading.Lock()
        # Under the lock: clusters before `_begun` are not to be had any more, those before
        # `_read` are in the thread's buffer or on the target, `_end` is where the thread stops.
        self._begun = self._read = first
        self._end = end
        self._tell: Callable[[], None] | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._first = first

    # -- in the thread -----------------------------------------------------------------------

    def copy(self, source: Descriptor, target: Descriptor, buffer: memoryview) -> Swept:
        """Copy until the end, or until an I/O fails, or this is unwanted. Blocks.

        ``buffer`` has room for a step.
        """
        written = self._first
        while (step := self._begin()) is not None:
            first, end = step
            view = buffer[: self._length(first, end)]
            try:
                source.read(first << self._shift, view)
            except OSError:
                break
            self._note_read(end)
            try:
                target.write(first << self._shift, view)
            except OSError:
                break
            written = end
        if written > self._first:
            target.begin_writeback(self._first << self._shift, self._length(self._first, written))
        return Swept(self._first, written, self._read, self._begun)

    def _begin(self) -> tuple[int, int] | None:
        with self._lock:
            first = self._begun
            if first >= self._end or self._unwanted():
                return None
            self._begun = min(first + self._step, self._end)
            return first, self._begun

    def _note_read(self, end: int) -> None:
        with self._lock:
            self._read = end
            if self._tell is not None:
                self._token.run_sync_soon(self._tell)
                self._tell = None

    # -- on the loop -------------------------------------------------------------------------

    @property
    def read_end(self) -> int:
        """Clusters before this are a guest's to write."""
        return self._read

    def take_from(self, cluster: int) -> bool:
        """Take the clusters from ``cluster`` on away from the thread, if it has not begun it."""
        with self._lock:
            if cluster < self._begun:
                return False
            self._end = cluster
            return True

    def tell_when_read(self, cluster: int, tell: Callable[[], None]) -> bool:
        """Call ``tell``, the same for everybody, when the thread has read more.

        False: it has read ``cluster``. It may end before it has.
        """
        with self._lock:
            if cluster < self._read:
                return False
            self._tell = tell
            return True
