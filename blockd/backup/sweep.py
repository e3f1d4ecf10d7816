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

    What was read beyond, up to ``read_end``, is in the buffer: writing it failed, or it is not
    plain. What was begun beyond, up to ``begun_end``, could not be read.
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
        is_plain: Callable[[memoryview], bool],
    ) -> None:
        """``length``: the bytes of a range of clusters. ``step``: clusters copied at a time.

        ``unwanted`` is asked in the thread before each step: whether to stop there; ``is_plain``
        when it has been read: whether it may be written, and not left to another to write.
        """
        self._length = length
        self._shift = shift
        self._step = step
        self._unwanted = unwanted
        self._is_plain = is_plain
        self._lock = threading.Lock()
        # Under the lock: clusters before `_begun` are not to be had any more, those before
        # `_read` are in the thread's buffer or on the target, `_end` is where the thread stops.
        self._begun = self._read = first
        self._end = end
        self._tell: Callable[[], None] | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._first = self._written = first
        self._last = end

    # -- in the thread -----------------------------------------------------------------------

    def copy(
        self, source: Descriptor, target: Descriptor, buffer: memoryview, end_bytes: int
    ) -> int:
        """Copy on, up to ``end_bytes``, or until an I/O fails, or something is in the way. Blocks.

        ``buffer`` has room for a step. Returns up to which byte the target has it all.
        """
        began = self._written
        # The disk's last cluster may be a part of one.
        whole = end_bytes == self._bytes_before(self._last)
        self._copy_steps(source, target, buffer, self._last if whole else end_bytes >> self._shift)
        if began < self._written:
            length = self._length(began, self._written)
            target.begin_writeback(began << self._shift, length)
        return self._bytes_before(self._written)

    def _bytes_before(self, end: int) -> int:
        return (self._first << self._shift) + self._length(self._first, end)

    def _copy_steps(
        self, source: Descriptor, target: Descriptor, buffer: memoryview, stop: int
    ) -> None:
        while (step := self._begin(stop)) is not None:
            first, end = step
            view = buffer[: self._length(first, end)]
            try:
                source.read(first << self._shift, view)
            except OSError:
                break
            self._note_read(end)
            if not self._is_plain(view):
                break
            try:
                target.write(first << self._shift, view)
            except OSError:
                break
            self._written = end

    def _begin(self, stop: int) -> tuple[int, int] | None:
        with self._lock:
            first, stop = self._begun, min(stop, self._end)
            if first >= stop or self._unwanted():
                return None
            self._begun = min(first + self._step, stop)
            return first, self._begun

    def _note_read(self, end: int) -> None:
        with self._lock:
            self._read = end
            if self._tell is not None:
                self._token.run_sync_soon(self._tell)
                self._tell = None

    # -- on the loop -------------------------------------------------------------------------

    @property
    def swept(self) -> Swept:
        """What became of it, once no thread copies any more."""
        return Swept(self._first, self._written, self._read, self._begun)

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
