"""The simulated disk behaves as the host's does, as far as the store can see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockd.state.disk import Disk, HostDisk
from tests.helpers.simulated_disk import SimulatedDisk


@pytest.fixture(params=["host", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return HostDisk(str(tmp_path / "marks")) if request.param == "host" else SimulatedDisk()


def test_a_new_file_is_zeroes(disk: Disk) -> None:
    fd = disk.create("1.1", 10_000)
    assert disk.read(fd, 20_000, 0) == bytes(10_000)
    disk.close(fd)
    assert list(disk.names()) == ["1.1"]


def test_what_is_written_is_read_through_any_descriptor(disk: Disk) -> None:
    first = disk.create("1.1", 10)
    disk.write(first, b"abc", 4)
    second = disk.open("1.1")
    assert disk.read(second, 3, 4) == b"abc"
    disk.sync(first)
    disk.sync_names()
    assert disk.read(second, 10, 8) == b"\0\0"
    disk.close(first)
    disk.close(second)


def test_creating_a_file_anew_empties_it(disk: Disk) -> None:
    fd = disk.create("1.1", 10)
    disk.write(fd, b"abc", 0)
    disk.close(fd)
    fd = disk.create("1.1", 5)
    assert disk.read(fd, 10, 0) == bytes(5)
    disk.close(fd)


def test_a_file_is_cut_and_grows_with_a_write(disk: Disk) -> None:
    fd = disk.create("1.1", 10)
    disk.truncate(fd, 2)
    assert disk.read(fd, 10, 0) == bytes(2)
    disk.write(fd, b"x", 4)
    assert disk.read(fd, 10, 0) == b"\0\0\0\0x"
    disk.close(fd)


def test_a_removed_file_is_gone_but_for_those_who_have_it_open(disk: Disk) -> None:
    fd = disk.create("1.1", 10)
    disk.unlink("1.1")
    disk.unlink("1.1")
    disk.write(fd, b"x", 0)
    assert disk.read(fd, 1, 0) == b"x"
    disk.close(fd)
    assert list(disk.names()) == []
    with pytest.raises(FileNotFoundError):
        disk.open("1.1")


def test_the_hosts_files_are_for_the_daemon_alone(tmp_path: Path) -> None:
    disk = HostDisk(str(tmp_path / "marks"))
    disk.close(disk.create("1.1", 10))
    assert os.stat(tmp_path / "marks").st_mode & 0o777 == 0o700
    assert os.stat(tmp_path / "marks" / "1.1").st_mode & 0o777 == 0o600
    disk.end()
