"""The few calls by which marks files are used: tests put a simulated disk in the host's place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from blockd.state.own_directory import make_own


class Disk(Protocol):
    """One directory of files. All calls block and raise ``OSError``.

    What was written is durable after ``sync`` of the file; that a file is there, or is not, after
    ``sync_names``.
    """

    def names(self) -> Sequence[str]:
        """All files, in no order."""
        ...

    def create(self, name: str, size_bytes: int) -> int:
        """Make an empty file with its space allocated, whatever was there; its descriptor."""
        ...

    def open(self, name: str) -> int:
        """A descriptor of a file that is there."""
        ...

    def read(self, fd: int, length: int, offset: int) -> bytes: ...

    def write(self, fd: int, data: bytes, offset: int) -> None: ...

    def sync(self, fd: int) -> None: ...

    def truncate(self, fd: int, size_bytes: int) -> None: ...

    def close(self, fd: int) -> None: ...

    def unlink(self, name: str) -> None:
        """Remove a file; it need not be there."""
        ...

    def sync_names(self) -> None: ...

    def end(self) -> None:
        """Let go of the directory."""
        ...


class HostDisk:
    """The host's file system."""

    def __init__(self, path: str) -> None:
        """As ``make_own``, and it is held from then on."""
        make_own(path)
        self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def end(self) -> None:
        os.close(self._directory)

    def names(self) -> Sequence[str]:
        return os.listdir(self._directory)

    def create(self, name: str, size_bytes: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self._directory)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                self.unlink(name)
            raise
        return fd

    def open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, dir_fd=self._directory)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        pieces = []
        while length and (piece := os.pread(fd, length, offset)):
            pieces.append(piece)
            length, offset = length - len(piece), offset + len(piece)
        return b"".join(pieces)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        done = os.pwrite(fd, data, offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def truncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)

    def sync_names(self) -> None:
        os.fsync(self._directory)
