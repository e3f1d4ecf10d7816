"""What threads use of a ``Descriptor``, for bytes that are in memory."""

from __future__ import annotations

from typing import Protocol, cast

from blockd.block import Descriptor


class Bytes(Protocol):
    """Bytes that can be reached in a thread."""

    def read_now(self, offset: int, view: memoryview) -> None: ...
    def write_now(self, offset: int, view: memoryview) -> None: ...


class _MemoryDescriptor:
    def __init__(self, content: Bytes, start: int) -> None:
        self._content = content
        self._start = start

    def moved(self, by: int) -> Descriptor:
        return memory_descriptor(self._content, self._start + by)

    def read(self, offset: int, view: memoryview) -> None:
        self._content.read_now(self._start + offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        self._content.write_now(self._start + offset, view)

    def begin_writeback(self, offset: int, length: int) -> None:
        assert self._start + offset >= 0
        assert length > 0


def memory_descriptor(content: Bytes, start: int = 0) -> Descriptor:
    return cast(Descriptor, _MemoryDescriptor(content, start))
