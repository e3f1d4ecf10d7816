"""Bitmaps of an overlay that was put on a disk: they outlive the daemon like any others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.kept_disk import DISK_BYTES, GRANULE_BYTES, KeptDisk
from tests.helpers.qcow2 import qemu_img


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    disk.add_bitmap("below")
    yield disk
    disk.end()


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return tmp_path / "overlay.qcow2"


def to_file(_disk: KeptDisk, overlay: Path) -> tuple[str, dict[str, Any]]:
    options = {"node-name": "disk", "snapshot-node-name": "overlay", "format": "qcow2"}
    return "blockdev-snapshot-sync", {**options, "snapshot-file": str(overlay)}


def to_node(disk: KeptDisk, overlay: Path) -> tuple[str, dict[str, Any]]:
    qemu_img("create", "-f", "qcow2", "-b", disk.image, "-F", "raw", overlay, str(DISK_BYTES))
    file = {"driver": "file", "filename": str(overlay)}
    node = {"driver": "qcow2", "node-name": "overlay", "file": file, "backing": None}
    disk.qmp.execute("blockdev-add", node)
    return "blockdev-snapshot", {"node": "disk", "overlay": "overlay"}


def put_over(
    disk: KeptDisk, overlay: Path, *, to: Any = to_file, transaction: bool = False
) -> None:
    """And give the overlay a bitmap at once."""
    command, arguments = to(disk, overlay)
    if transaction:
        actions = [{"type": command, "data": arguments}]
        disk.qmp.execute("transaction", {"actions": actions})
    else:
        disk.qmp.execute(command, arguments)
    bitmap = {"name": "b", "persistent": True, "granularity": GRANULE_BYTES}
    disk.qmp.execute("block-dirty-bitmap-add", {"node": "overlay", **bitmap})


def start_with(disk: KeptDisk, overlay: Path) -> None:
    """A daemon whose disk is the overlay."""
    disk.driver, disk.image = "qcow2", overlay
    disk.start()


def check_survives(disk: KeptDisk, overlay: Path) -> None:
    """What is written now is dirty, and all that is, after a kill."""
    disk.write([2, 5])
    disk.kill()
    start_with(disk, overlay)
    disk.check_dirty([2, 5])
    assert "reason" not in disk.infos()["b"]


@pytest.mark.parametrize("to", [to_file, to_node])
@pytest.mark.parametrize("transaction", [False, True], ids=["alone", "in a transaction"])
def test_after_a_kill(disk: KeptDisk, overlay: Path, to: Any, transaction: bool) -> None:
    put_over(disk, overlay, to=to, transaction=transaction)
    check_survives(disk, overlay)
    assert list(disk.infos()) == ["b"]


def test_after_a_kill_before_any_write(disk: KeptDisk, overlay: Path) -> None:
    put_over(disk, overlay)
    disk.kill()
    start_with(disk, overlay)
    disk.check_dirty([])


def test_an_image_that_was_there_before_leaves_none(disk: KeptDisk, overlay: Path) -> None:
    """What the state directory has of a file that the overlay has taken the place of is over."""
    qemu_img("create", "-f", "qcow2", overlay, str(DISK_BYTES))
    file = {"driver": "file", "filename": str(overlay)}
    disk.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "old", "file": file})
    for name in ("b", "old"):
        options = {"name": name, "persistent": True, "granularity": GRANULE_BYTES}
        disk.qmp.execute("block-dirty-bitmap-add", {"node": "old", **options})
    disk.qmp.execute("blockdev-del", {"node-name": "old"})
    put_over(disk, overlay)
    check_survives(disk, overlay)
    assert list(disk.infos()) == ["b"]


def test_one_that_was_made_before_has_its_bitmaps(disk: KeptDisk, overlay: Path) -> None:
    """In an image of version 2 nobody else could keep them."""
    below = ["-b", disk.image, "-F", "raw"]
    qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", *map(str, below), overlay, "64M")
    file = {"driver": "file", "filename": str(overlay)}
    node = {"driver": "qcow2", "node-name": "old", "file": file, "backing": None}
    disk.qmp.execute("blockdev-add", node)
    bitmap = {"name": "b", "persistent": True, "granularity": GRANULE_BYTES}
    disk.qmp.execute("block-dirty-bitmap-add", {"node": "old", **bitmap})
    disk.qmp.execute("blockdev-del", {"node-name": "old"})
    command, arguments = to_file(disk, overlay)
    disk.qmp.execute(command, {**arguments, "mode": "existing"})
    check_survives(disk, overlay)
