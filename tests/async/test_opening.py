"""Which files become nodes, and what is said about the others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.block.drivers.direct import DirectFileDriver
from blockd.block.drivers.file import FileDriver
from blockd.block.drivers.opening import create_file, guess_format, open_file
from blockd.errors import BlockdError


def opened(
    path: Path | str,
    *,
    driver: str = "file",
    read_only: bool = False,
    auto_read_only: bool = False,
    direct: bool = False,
) -> FileDriver:
    return open_file(
        str(path),
        driver=driver,
        read_only=read_only,
        auto_read_only=auto_read_only,
        direct=direct,
        unmap=True,
        flushes=True,
    )


def close(driver: FileDriver) -> None:
    os.close(driver._fd)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_nothing(_: Path) -> None:
    pass


Maker = Callable[[Path], None]

REFUSED: dict[str, tuple[Maker, bool, str]] = {
    "missing": (make_nothing, False, "Could not open 'NAME': No such file or directory"),
    "directory": (Path.mkdir, False, "Could not open 'NAME': Is a directory"),
    "directory, read-only": (
        Path.mkdir,
        True,
        "'file' driver requires 'NAME' to be a regular file",
    ),
    "fifo": (make_fifo, False, "'file' driver requires 'NAME' to be a regular file"),
    # An open that waited for somebody to write into it would never end.
    "fifo, read-only": (make_fifo, True, "'file' driver requires 'NAME' to be a regular file"),
    "socket": (make_socket, False, "Could not open 'NAME': No such device or address"),
}


@pytest.mark.parametrize(("make", "read_only", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.usefixtures("no_leak")
def test_what_is_no_file_is_refused(
    tmp_path: Path, make: Maker, *, read_only: bool, message: str
) -> None:
    path = tmp_path / "name"
    make(path)
    with pytest.raises(BlockdError) as raised:
        opened(path, read_only=read_only)
    assert raised.value.message == message.replace("NAME", str(path))


@pytest.mark.usefixtures("no_leak")
def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "name"
    with pytest.raises(BlockdError) as raised:
        opened(path)
    assert raised.value.message == f"Could not open '{path}': Not a directory"


@pytest.mark.usefixtures("no_leak")
def test_a_driver_takes_only_its_own_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(BlockdError) as raised:
        opened(path, driver="host_device")
    assert raised.value.message == (
        f"'host_device' driver requires '{path}' to be either a character or block device"
    )
    with pytest.raises(BlockdError, match="requires '/dev/null' to be a regular file"):
        opened("/dev/null")
    device = opened("/dev/null", driver="host_device")
    assert (device.name, device.size_bytes, device.path) == ("host_device", 0, None)
    close(device)


@pytest.mark.usefixtures("no_leak")
def test_a_device_without_positions_is_refused() -> None:
    with pytest.raises(BlockdError, match="Could not open '/dev/ptmx': Illegal seek"):
        opened("/dev/ptmx", driver="host_device")


@pytest.mark.usefixtures("no_leak")
def test_a_file_system_without_o_direct_is_named() -> None:
    with pytest.raises(BlockdError, match="filesystem does not support O_DIRECT"):
        opened("/sys/kernel/notes", read_only=True, direct=True)


@pytest.mark.usefixtures("no_leak")
def test_a_file_that_is_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    first = opened(path)
    with pytest.raises(BlockdError, match="Failed to get"):
        opened(path)
    with pytest.raises(BlockdError, match="Failed to get"):
        create_file(str(path), 5)
    assert path.read_bytes() == b"x" * 1000
    close(first)
    close(opened(path))


@pytest.mark.usefixtures("no_leak")
async def test_a_file_that_is_read_is_not_made_into_a_target(tmp_path: Path) -> None:
    """It may be the very disk that is to be backed up."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    reader = opened(path, read_only=True)
    target = create_file(str(path), 5).driver
    with pytest.raises(BlockdError, match='Failed to get "resize" lock'):
        await target.make_empty()
    assert path.read_bytes() == b"x" * 1000
    close(reader)
    await target.make_empty()
    close(opened(path, read_only=True))
    close(target)


@pytest.mark.usefixtures("no_leak")
def test_what_was_opened_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 513)
    plain, reader = opened(path), opened(path, read_only=True)
    assert (plain.name, plain.filename, plain.path) == ("file", str(path), str(path))
    assert (plain.size_bytes, plain.read_only, reader.read_only) == (1024, False, True)
    assert os.get_blocking(plain._fd)
    assert not os.get_inheritable(plain._fd)
    close(plain)
    close(reader)


def test_direct_is_another_driver(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 513)
    try:
        driver = opened(path, direct=True)
    except BlockdError as error:
        pytest.skip(error.message)
    assert isinstance(driver, DirectFileDriver)
    assert driver.direct
    close(driver)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_auto_read_only_falls_back_where_writing_is_not_allowed(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    really_open = os.open

    def refuse_writing(name: str, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number))
        return really_open(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_writing)
    with pytest.raises(BlockdError, match=f"Could not open '{path}': {os.strerror(number)}"):
        opened(path)
    driver = opened(path, auto_read_only=True)
    assert driver.read_only
    close(driver)


# --- targets ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("before", [None, b"", b"x" * 5000])
async def test_a_target_is_made_of_zeroes(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "target"
    if before is not None:
        path.write_bytes(before)
    driver, made = create_file(str(path), 2048)
    assert made == (str(path) if before is None else None)
    assert driver.size_bytes == 2048
    assert path.read_bytes() == (before or b"")
    await driver.make_empty()
    assert path.read_bytes() == bytes(2048)
    assert path.stat().st_blocks == 0
    close(driver)


@pytest.mark.usefixtures("no_leak")
def test_a_target_that_was_made_can_be_taken_back(tmp_path: Path) -> None:
    target = create_file(str(tmp_path / "target"), 2048)
    target.remove()
    assert list(tmp_path.iterdir()) == []
    close(target.driver)


@pytest.mark.usefixtures("no_leak")
def test_a_target_that_was_there_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"data")
    target = create_file(str(path), 2048)
    target.remove()
    assert path.read_bytes() == b"data"
    close(target.driver)


@pytest.mark.usefixtures("no_leak")
def test_what_has_taken_a_targets_name_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "target"
    target = create_file(str(path), 2048)
    path.unlink()
    target.remove()
    path.write_bytes(b"of somebody else")
    target.remove()
    assert path.read_bytes() == b"of somebody else"
    close(target.driver)


@pytest.mark.usefixtures("no_leak")
def test_a_link_to_nowhere_makes_the_target_where_it_leads(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "target"
    link.symlink_to(path)
    target = create_file(str(link), 2048)
    assert path.read_bytes() == b""
    target.remove()
    assert list(tmp_path.iterdir()) == [link]
    close(target.driver)


TARGETS_REFUSED: dict[str, tuple[Maker, str]] = {
    "directory": (Path.mkdir, "Could not create 'NAME': Is a directory"),
    "fifo": (make_fifo, "'file' driver requires 'NAME' to be a regular file"),
    "socket": (make_socket, "Could not create 'NAME': No such device or address"),
}


@pytest.mark.parametrize(("make", "message"), TARGETS_REFUSED.values(), ids=TARGETS_REFUSED.keys())
@pytest.mark.usefixtures("no_leak")
def test_what_can_be_no_target_is_refused(tmp_path: Path, make: Maker, message: str) -> None:
    path = tmp_path / "name"
    make(path)
    with pytest.raises(BlockdError) as raised:
        create_file(str(path), 512)
    assert raised.value.message == message.replace("NAME", str(path))


@pytest.mark.usefixtures("no_leak")
def test_a_target_in_a_missing_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none" / "x"
    with pytest.raises(BlockdError) as raised:
        create_file(str(path), 512)
    assert raised.value.message == f"Could not create '{path}': No such file or directory"


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize(
    ("start", "guess"),
    [(b"", "raw"), (b"QFI", "raw"), (b"QFI\xfb\0\0\0\3", "qcow2"), (b"KDMV....", "vmdk")],
)
def test_the_format_is_guessed_from_the_first_bytes(
    tmp_path: Path, start: bytes, guess: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(start + bytes(1000) if start else b"")
    assert guess_format(str(path)) == guess


@pytest.mark.usefixtures("no_leak")
def test_guessing_neither_waits_nor_leaks(tmp_path: Path) -> None:
    make_fifo(tmp_path / "fifo")
    assert guess_format(str(tmp_path / "fifo")) == "raw"
    with pytest.raises(BlockdError, match="Is a directory"):
        guess_format(str(tmp_path))
