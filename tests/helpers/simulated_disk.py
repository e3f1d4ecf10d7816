"""A directory of files in memory that knows what would be left of it after a power cut."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random


@dataclass
class File:
    """``durable`` is what was synced; ``pending`` is what came since, in order.

    A change is an offset and its data, or a size and None.
    """

    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, at: int, data: bytes | None) -> None:
        _apply(self.content, at, data)
        self.pending.append((at, data))

    def sync(self) -> None:
        self.durable, self.pending = bytearray(self.content), []

    def after_power_cut(self, random: Random) -> File:
        """Each change is there or not; of a long one some blocks may be."""
        content = bytearray(self.durable)
        kept = [change for change in self.pending if random.random() < 0.5]
        random.shuffle(kept)
        for at, data in kept:
            torn = data is not None and random.random() < 0.3
            part = data[: random.randrange(len(data) + 1)] if data is not None and torn else data
            _apply(content, at, part)
        return File(bytearray(content), content)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    end = at if data is None else at + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[at:]
    else:
        content[at:end] = data


class SimulatedDisk:
    """``blockd.state.disk.Disk``; ``before`` hears of each call, and may raise in its place."""

    def __init__(self, names: dict[str, File] | None = None) -> None:
        self.now: dict[str, File] = names or {}
        self.durable: dict[str, File] = dict(self.now)
        self.before: Callable[[str], None] = lambda _: None
        self._open: dict[int, File] = {}
        self._fds = count(1000)

    def after_kill(self) -> SimulatedDisk:
        """What the next process finds."""
        return SimulatedDisk(copy.deepcopy(self.now))

    def after_power_cut(self, random: Random) -> SimulatedDisk:
        """One of the things that the next boot may find."""
        names: dict[str, File] = {}
        for name in sorted({*self.now, *self.durable}):
            of = random.choice([self.now, self.durable])
            if name in of:
                names[name] = of[name].after_power_cut(random)
        return SimulatedDisk(names)

    def names(self) -> Sequence[str]:
        self.before("names")
        return list(self.now)

    def create(self, name: str, size_bytes: int) -> int:
        self.before("create")
        file = self.now.setdefault(name, File())
        file.change(0, None)
        self.before("fallocate")
        file.change(size_bytes, None)
        return self._new_fd(file)

    def open(self, name: str) -> int:
        self.before("open")
        if name not in self.now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._new_fd(self.now[name])

    def _new_fd(self, file: File) -> int:
        fd = next(self._fds)
        self._open[fd] = file
        return fd

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self.before("read")
        return bytes(self._open[fd].content[offset : offset + length])

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self.before("write")
        self._open[fd].change(offset, bytes(data))

    def sync(self, fd: int) -> None:
        self.before("sync")
        self._open[fd].sync()

    def truncate(self, fd: int, size_bytes: int) -> None:
        self.before("truncate")
        self._open[fd].change(size_bytes, None)

    def close(self, fd: int) -> None:
        self.before("close")
        del self._open[fd]

    def unlink(self, name: str) -> None:
        self.before("unlink")
        self.now.pop(name, None)

    def sync_names(self) -> None:
        self.before("sync_names")
        self.durable = dict(self.now)

    def end(self) -> None:
        self.before("end")
