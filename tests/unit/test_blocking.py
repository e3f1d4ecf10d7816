"""System calls at the edges: signals, files that change meanwhile, strict file systems."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd.block import Allocation
from blockd.block.drivers import blocking, syscalls
from blockd.block.drivers.syscalls import Mode
from blockd.extent import Extent

SIZE = 8192


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def fails_first(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the first fallocate fail; the modes of all that were tried."""
    modes: list[int] = []
    real = syscalls._fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> Any:
        modes.append(mode)
        if len(modes) > 1:
            return real(fd, mode, offset, length)
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(syscalls, "_fallocate", fallocate)
    return modes


def test_a_signal_does_not_fail_a_fallocate(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = fails_first(errno.EINTR, monkeypatch)
    assert blocking.zero_range(fd, 0, SIZE, punch=True)
    assert len(modes) == 2
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)


def test_zeroes_without_holes_are_the_second_choice(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = fails_first(errno.EOPNOTSUPP, monkeypatch)
    assert blocking.zero_range(fd, 0, SIZE, punch=True)
    assert modes == [Mode.PUNCH_HOLE | Mode.KEEP_SIZE, Mode.ZERO_RANGE]
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_raised(
    fd: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_first(number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        blocking.zero_range(fd, 0, SIZE, punch=False)


def test_a_discard_that_is_not_supported_changes_nothing(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_first(errno.EOPNOTSUPP, monkeypatch)
    blocking.discard_file(fd, 0, SIZE)
    assert os.pread(fd, SIZE, 0) == b"x" * SIZE


def test_a_read_of_blocks_does_not_go_on_behind_the_end(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems refuse an O_DIRECT read from within a block, even where there is none."""
    os.ftruncate(fd, 700)
    real = os.preadv

    def strict(fd: int, views: list[memoryview], offset: int) -> int:
        if offset % 512:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", strict)
    memory = memoryview(bytearray(b"?" * 2048))
    blocking.read(fd, 0, memory, block_bytes=512)
    assert bytes(memory) == b"x" * 700 + bytes(1348)


def test_a_file_that_shrinks_while_it_is_asked_reads_as_a_hole(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lseek

    def shrinking(fd: int, offset: int, whence: int) -> int:
        result = real(fd, offset, whence)
        os.ftruncate(fd, 0)
        return result

    monkeypatch.setattr(os, "lseek", shrinking)
    runs = blocking.allocation(fd, 4096, 4096)
    assert runs == [Allocation(Extent(4096, 4096), zero=True)]


def test_a_hole_that_comes_up_while_it_is_asked_is_called_data(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lseek

    def punching(fd: int, offset: int, whence: int) -> int:
        result = real(fd, offset, whence)
        syscalls.fallocate(fd, Mode.PUNCH_HOLE | Mode.KEEP_SIZE, 0, SIZE)
        return result

    monkeypatch.setattr(os, "lseek", punching)
    assert blocking.allocation(fd, 0, SIZE) == [Allocation(Extent(0, SIZE), zero=False)]


def test_storage_that_knows_no_holes_is_all_data(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "lseek", refuse)
    assert blocking.allocation(fd, 0, SIZE) == [Allocation(Extent(0, SIZE), zero=False)]
