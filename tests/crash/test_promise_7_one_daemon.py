"""Promise 7: two daemons on one state directory, or on one image: the second is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.kept_disk import KeptDisk
from tests.helpers.qmp_client import QmpError


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    yield disk
    disk.end()


def test_a_second_daemon_on_the_state_directory(disk: KeptDisk, tmp_path: Path) -> None:
    directory = tmp_path / "second"
    directory.mkdir()
    second = Daemon(directory, options=["--state-dir", str(disk.state)])
    refusal = f"'{disk.state}' is in use by another blockd \\(process {disk.daemon.pid}\\)"
    with pytest.raises(RuntimeError, match=refusal):
        second.start()
    assert second.wait() == 1
    disk.check_dirty([1])
    # It is free again as soon as its daemon is gone, however that went.
    disk.kill()
    second.start()
    assert second.terminate() == 0


def test_a_second_daemon_on_the_image(disk: KeptDisk, tmp_path: Path) -> None:
    directory = tmp_path / "second"
    directory.mkdir()
    second = KeptDisk(directory, image=disk.image)
    try:
        with pytest.raises(QmpError, match=str(disk.image)):
            second.start()
    finally:
        second.end()
    disk.write([2])
    disk.check_dirty([1, 2])
