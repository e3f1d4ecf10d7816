"""What a writer was about to write, and what it heard of it: two files that outlive every kill.

Nothing is synced: only the daemon is killed, so the page cache stays. A writer logs each write
before it sends it, and its answer when that has come; whoever reads the files knows what may be
on the disk, and what must be.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 4096

_RECORD = struct.Struct("<QII")
_STAMP = struct.Struct("<QQ")


class Kind(IntEnum):
    WRITE = 0
    ZERO = 1
    TRIM = 2


class Answer(IntEnum):
    NONE = 0
    DONE = 1
    ERROR = 2


class Logged(NamedTuple):
    """One write; offset and length in bytes, whole blocks."""

    offset: int
    length: int
    kind: Kind

    def blocks(self) -> range:
        return range(self.offset // BLOCK_BYTES, (self.offset + self.length) // BLOCK_BYTES)


def stamped(number: int, block: int) -> bytes:
    """The content of a block that write ``number`` has written."""
    return _STAMP.pack(number + 1, block) * (BLOCK_BYTES // _STAMP.size)


class WriteLog:
    """The log of one disk. A write's number is its place in it."""

    def __init__(self, directory: Path, name: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._records = os.open(directory / f"{name}.log", flags | os.O_APPEND)
        self._answers = os.open(directory / f"{name}.answers", flags)

    def close(self) -> None:
        os.close(self._records)
        os.close(self._answers)

    def append(self, write: Logged) -> int:
        """Log a write that is about to be sent; returns its number."""
        number = self.count()
        os.write(self._records, _RECORD.pack(*write))
        return number

    def answer(self, number: int, answer: Answer) -> None:
        os.pwrite(self._answers, bytes([answer]), number)

    def count(self) -> int:
        return os.fstat(self._records).st_size // _RECORD.size

    def unanswered_from(self, first: int) -> int:
        """The first write from ``first`` on that has no answer; the end where all have."""
        end = self.count()
        answers = self._answers_of(first, end)
        found = answers.find(Answer.NONE)
        return end if found < 0 else first + found

    def entries(self, first: int, end: int) -> Iterator[tuple[int, Logged, Answer]]:
        """The writes from ``first`` up to ``end``, with what is known of each by now."""
        answers = self._answers_of(first, end)
        data = os.pread(self._records, (end - first) * _RECORD.size, first * _RECORD.size)
        for at, (offset, length, kind) in enumerate(_RECORD.iter_unpack(data)):
            yield first + at, Logged(offset, length, Kind(kind)), Answer(answers[at])

    def _answers_of(self, first: int, end: int) -> bytes:
        return os.pread(self._answers, end - first, first).ljust(end - first, b"\0")
