"""Promise 1: bitmaps persist on every writable node with an image, and come back by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.kept_disk import DISK_BYTES, GRANULE_BYTES, KeptDisk
from tests.helpers.loop_device import loop_device
from tests.helpers.qcow2 import qemu_img
from tests.helpers.qmp_client import QmpClient, QmpError


@pytest.fixture(params=["raw", "qcow2", "qcow2 v2", "block device"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeptDisk]:
    if request.param == "block device":
        backing = tmp_path / "device.img"
        with backing.open("wb") as file:
            file.truncate(DISK_BYTES)
        with loop_device(backing) as device:
            disk = KeptDisk(tmp_path, image=Path(device))
            yield disk
            disk.end()
    else:
        image = None
        if request.param == "qcow2 v2":
            image = tmp_path / "disk.v2"
            qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", image, str(DISK_BYTES))
        driver = request.param.removesuffix(" v2")
        disk = KeptDisk(tmp_path, driver=driver, image=image)
        yield disk
        disk.end()


def test_they_are_back_without_a_command(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap("b")
    disk.add_bitmap("stopped")
    disk.add_bitmap("never", disabled=True)
    disk.add_bitmap("gone", persistent=False)
    disk.write([1, 5])
    disk.change_bitmap("disable", "stopped")
    disk.write([9])
    disk.quit()

    disk.start()
    assert {name: info["recording"] for name, info in disk.infos().items()} == {
        "b": True,
        "stopped": False,
        "never": False,
    }
    assert not any("reason" in info for info in disk.infos().values())
    disk.check_dirty([1, 5, 9])
    disk.check_dirty([1, 5], "stopped")
    disk.check_dirty([], "never")
    disk.write([7])
    disk.check_dirty([1, 5, 7, 9])
    disk.check_dirty([1, 5], "stopped")


def test_they_are_back_when_the_node_is(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap()
    disk.write([2])
    for granule in (3, 4):
        disk.unexport()
        disk.qmp.execute("blockdev-del", {"node-name": "disk"})
        disk.open()
        disk.export()
        disk.check_dirty(range(2, granule))
        disk.write([granule])
    disk.check_dirty([2, 3, 4])


def test_a_removed_one_stays_away(disk: KeptDisk) -> None:
    disk.start()
    disk.add_bitmap("b")
    disk.add_bitmap("c")
    disk.change_bitmap("remove", "b")
    disk.kill()
    disk.start()
    assert list(disk.infos()) == ["c"]
    disk.change_bitmap("remove", "c")
    disk.quit()
    disk.start()
    assert disk.infos() == {}


def test_without_a_state_directory_the_way_out_is_told(tmp_path: Path, daemon: Daemon) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    file = {"driver": "file", "filename": str(image)}
    with QmpClient(daemon.qmp_path) as qmp:
        qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
        bitmap = {"node": "disk", "name": "b", "persistent": True}
        with pytest.raises(QmpError, match="start blockd with --state-dir"):
            qmp.execute("block-dirty-bitmap-add", bitmap)


def test_a_node_that_is_made_along_with_another_has_its_own(tmp_path: Path) -> None:
    """The file below a raw node, say, where that has a name."""
    disk = KeptDisk(tmp_path)
    file = {"driver": "file", "node-name": "below", "filename": str(disk.image)}
    node = {"driver": "raw", "node-name": "disk", "file": file}
    added = {"node": "below", "name": "b", "persistent": True, "granularity": GRANULE_BYTES}
    try:
        for life in range(3):
            disk.daemon.start()
            disk.qmp = QmpClient(disk.daemon.qmp_path)
            disk.qmp.execute("blockdev-add", node)
            if not life:
                disk.qmp.execute("block-dirty-bitmap-add", added)
            address = {"type": "unix", "data": {"path": str(disk.directory / "nbd.sock")}}
            disk.qmp.execute("nbd-server-start", {"addr": address})
            disk.export()
            disk.write([life])
            rows = disk.qmp.execute("query-named-block-nodes")
            (row,) = (row for row in rows if row["node-name"] == "below")
            (info,) = row["dirty-bitmaps"]
            assert info["count"] == (life + 1) * GRANULE_BYTES
            disk.kill()
    finally:
        disk.end()
