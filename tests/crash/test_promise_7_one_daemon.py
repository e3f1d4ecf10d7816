"""Promise 7: two daemons on one state directory, or on one image: the second is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.kept_disk import KeptDisk
from tests.helpers.qmp_client import QmpClient, QmpError


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    yield disk
    disk.end()


@pytest.mark.parametrize("other_name", [False, True])
def test_a_second_daemon_on_the_state_directory(
    disk: KeptDisk, tmp_path: Path, *, other_name: bool
) -> None:
    directory = tmp_path / "second"
    directory.mkdir()
    state = disk.state
    if other_name:
        state = directory / "link"
        state.symlink_to(disk.state)
    second = Daemon(directory, options=["--state-dir", str(state)])
    refusal = f"'{state}' is in use by another blockd \\(process {disk.daemon.pid}\\)"
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


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_a_second_daemon_on_the_image_by_another_name(tmp_path: Path, driver: str) -> None:
    for directory in ("first", "second"):
        (tmp_path / directory).mkdir()
    disk = KeptDisk(tmp_path / "first", driver=driver)
    second = Daemon(tmp_path / "second", options=["--state-dir", str(tmp_path / "state")])
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    names = [disk.image, tmp_path / "hard link", tmp_path / "symbolic link"]
    os.link(disk.image, names[1])
    names[2].symlink_to(disk.image)
    second.start()
    try:
        with QmpClient(second.qmp_path) as qmp:
            for name in names:
                check_refused(qmp, name, driver)
    finally:
        second.kill()
        disk.write([2])
        disk.check_dirty([1, 2])
        disk.kill()
        disk.start()
        disk.check_dirty([1, 2])
        disk.end()


def check_refused(qmp: QmpClient, name: Path, driver: str) -> None:
    """Nothing may write to it. As with QEMU it may be read, where its format is nothing to read."""
    file = {"driver": "file", "filename": str(name)}
    node = {"driver": driver, "node-name": "disk", "file": file}
    with pytest.raises(QmpError, match=f"using '{name}'"):
        qmp.execute("blockdev-add", node)
    if driver == "qcow2":
        with pytest.raises(QmpError, match=f"using '{name}'"):
            qmp.execute("blockdev-add", {**node, "read-only": True})
        return
    qmp.execute("blockdev-add", {**node, "read-only": True})
    with pytest.raises(QmpError, match=f"using '{name}'"):
        qmp.execute("blockdev-reopen", {"options": [node]})
    qmp.execute("blockdev-del", {"node-name": "disk"})
