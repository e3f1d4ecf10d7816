"""A node's bytes by a file descriptor, for worker threads that copy much in one go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blockd.block.drivers import blocking


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Byte 0 of the node is byte ``start`` of ``fd``. The calls block; they raise ``OSError``."""

    fd: int
    start: int

    def moved(self, by: int) -> Descriptor:
        """The same bytes, each at an offset that is lower by so much."""
        return Descriptor(self.fd, self.start + by)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` of the node."""
        blocking.read(self.fd, self.start + offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at ``offset`` of the node."""
        blocking.write(self.fd, self.start + offset, view)

    def begin_writeback(self, offset: int, length: int) -> None:
        """Let the kernel begin to bring the range to the disk, so that a flush has less to do."""
        blocking.begin_writeback(self.fd, self.start + offset, length)


#: Writes by the descriptor, up to a byte, what is not written yet; returns up to where it did.
WriteBy = Callable[[Descriptor, int], int]


def moved(call: WriteBy, by: int) -> WriteBy:
    """``call`` for a node that has the same bytes at offsets that are higher by so much."""
    return lambda below, end: call(below.moved(by), end - by) + by
