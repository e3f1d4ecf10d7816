"""Image locks, between ourselves and with QEMU's programs as other processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockd.block.drivers.locking import lock_image, resizing
from blockd.errors import BlockdError
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tools import require_tool

SIZE = 1024 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    return image


@contextmanager
def locked(image: Path, *, read_only: bool = False) -> Iterator[None]:
    """We hold the image; raises what ``lock_image`` does."""
    fd = os.open(image, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        lock_image(fd, str(image), read_only=read_only)
        yield
    finally:
        os.close(fd)


@contextmanager
def qemu_io_stopped(image: Path, *arguments: str) -> Iterator[None]:
    """A qemu-io that has opened the image, done a command, and stays."""
    command = [require_tool("qemu-io"), "-f", "raw", *arguments, "-c", "sigraise 19", str(image)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def qemu_export(image: Path) -> Iterator[None]:
    """A qemu-storage-daemon that lets clients write to the image."""
    pid_file, directory = image.with_suffix(".pid"), image.parent
    subprocess.run(
        [
            *[require_tool("qemu-storage-daemon"), "--daemonize", "--pidfile", str(pid_file)],
            *["--blockdev", f"driver=file,filename={image},node-name=file"],
            *["--blockdev", "driver=raw,file=file,node-name=raw"],
            *["--nbd-server", f"addr.type=unix,addr.path={directory}/nbd.sock"],
            *["--export", "type=nbd,id=e,node-name=raw,writable=on"],
        ],
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    process = os.pidfd_open(int(pid_file.read_text()))
    try:
        yield
    finally:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def qemu_io(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require_tool("qemu-io"), "-f", "raw", *arguments, str(image)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


WRITE = ("-c", "write 0 512")
READ = ("-r", "-c", "read 0 512")


def test_qemu_does_not_write_to_what_we_write_to(image: Path) -> None:
    with locked(image):
        refused = qemu_io(image, *WRITE)
        assert refused.returncode != 0
        assert 'Failed to get "write" lock' in refused.stderr
        assert qemu_io(image, *READ).returncode == 0
    assert qemu_io(image, *WRITE).returncode == 0


def test_qemu_may_do_anything_with_what_we_only_read(image: Path) -> None:
    with locked(image, read_only=True):
        assert qemu_io(image, *READ).returncode == 0
        assert qemu_io(image, *WRITE).returncode == 0


def test_we_do_not_write_to_what_qemu_writes_to(image: Path) -> None:
    with qemu_io_stopped(image, *WRITE):
        with pytest.raises(BlockdError, match='Failed to get shared "write" lock'), locked(image):
            pass
        with locked(image, read_only=True):
            pass
    with locked(image):
        pass


def test_we_do_not_write_to_what_qemu_exports_writable(image: Path) -> None:
    with (
        qemu_export(image),
        pytest.raises(BlockdError, match='Failed to get shared "write" lock'),
        locked(image),
    ):
        pass


def test_we_write_to_what_qemu_only_reads(image: Path) -> None:
    with qemu_io_stopped(image, *READ), locked(image):
        pass


def test_two_writers_of_ours_exclude_each_other(image: Path) -> None:
    with locked(image):
        with pytest.raises(BlockdError, match="is another process or node using"), locked(image):
            pass
        with locked(image, read_only=True):
            pass
    with locked(image):
        pass


def test_readers_share(image: Path) -> None:
    with locked(image, read_only=True), locked(image, read_only=True), locked(image):
        pass


def test_kill_9_leaves_no_lock_behind(image: Path) -> None:
    program = f"""
import os, signal
from blockd.block.drivers.locking import lock_image, resizing
lock_image(os.open({str(image)!r}, os.O_RDWR), "image", read_only=False)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        with pytest.raises(BlockdError), locked(image):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(image):
        pass


def test_a_foreign_lock_on_the_whole_file_is_a_refusal(image: Path) -> None:
    """Not an error of the disk: some programs lock with plain fcntl or lockf."""
    fd = os.open(image, os.O_RDWR)
    # In this process a classic lock and ours have different owners.
    fcntl.lockf(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockdError, match="Failed to get"), locked(image):
        pass
    os.close(fd)


def test_a_refused_resize_leaves_no_lock(image: Path) -> None:
    """Not even where somebody else relies on the size, or where it fails."""
    fd = os.open(image, os.O_RDWR)
    try:
        with (
            locked(image, read_only=True),
            pytest.raises(BlockdError, match='"resize" lock'),
            resizing(fd, str(image)),
        ):
            pass
        with pytest.raises(OSError, match="full"), resizing(fd, str(image)):
            raise OSError("full")
        with locked(image, read_only=True):
            pass
    finally:
        os.close(fd)
