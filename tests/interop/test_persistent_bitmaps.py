"""A running daemon's bitmaps in an image, with QEMU using it in between, and after kill -9."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qcow2 import check, qemu_img, qemu_io
from tests.helpers.qmp_client import QmpClient, QmpError

MIB = 1 << 20
GRANULE = 65536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, "64M")
    return path


def flags(image: Path) -> dict[str, list[str]]:
    info = json.loads(qemu_img("info", "-U", "--output=json", image))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: each["flags"] for each in bitmaps}


def open_image(client: QmpClient, image: Path) -> None:
    file = {"driver": "file", "filename": str(image)}
    client.execute("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file})


def add(client: QmpClient, name: str) -> None:
    client.execute("block-dirty-bitmap-add", {"node": "n", "name": name, "persistent": True})


def write(client: QmpClient, directory: Path, *offsets: int) -> None:
    """A guest writes at each offset, and leaves."""
    path = str(directory / "nbd.sock")
    client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    client.execute(
        "block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
    )
    guest = NbdClient.open(path, "n")
    for offset in offsets:
        guest.write(offset, b"g" * 4096)
    guest.close()
    client.execute("nbd-server-stop")


def bitmaps(client: QmpClient) -> dict[str, dict[str, Any]]:
    nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes")}
    return {each["name"]: each for each in nodes["n"].get("dirty-bitmaps", [])}


def test_each_goes_on_where_the_other_stopped(daemon: Daemon, image: Path) -> None:
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        add(client, "b")
        write(client, image.parent, 0, 5 * MIB)
        client.execute("blockdev-del", {"node-name": "n"})
        check(image)
        assert flags(image) == {"b": ["auto"]}
        qemu_io(image, "write 9M 4k", "discard 20M 1M")
        check(image)
        open_image(client, image)
        assert bitmaps(client)["b"]["count"] == 3 * GRANULE + MIB
    assert daemon.terminate() == 0
    check(image)
    assert flags(image) == {"b": ["auto"]}
    qemu_img("bitmap", "--remove", image, "b")
    check(image)


def test_qemu_img_changes_them_in_between(daemon: Daemon, image: Path) -> None:
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        for name in ("a", "b", "c"):
            add(client, name)
        write(client, image.parent, 0, 5 * MIB)
        client.execute("block-dirty-bitmap-clear", {"node": "n", "name": "b"})
        write(client, image.parent, 9 * MIB)
        client.execute("blockdev-del", {"node-name": "n"})
        qemu_img("bitmap", "--merge", "b", "--clear", "--merge", "b", "--disable", image, "a")
        qemu_img("bitmap", "--remove", image, "c")
        qemu_img("bitmap", "--add", "--merge", "a", "-g", "128k", image, "d")
        check(image)
        open_image(client, image)
        found = {name: (each["count"], each["recording"]) for name, each in bitmaps(client).items()}
        assert found == {
            "a": (GRANULE, False),
            "b": (GRANULE, True),
            "d": (2 * GRANULE, True),
        }
        client.execute("blockdev-del", {"node-name": "n"})
    assert flags(image) == {"a": [], "b": ["auto"], "d": ["auto"]}
    check(image)


def test_they_are_in_the_image_while_it_is_read_only(daemon: Daemon, image: Path) -> None:
    """What others change then, whom no lock keeps out, is found out before it is spoilt."""
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        add(client, "b")
        write(client, image.parent, 0)
        reopen(client, image, read_only=True)
        assert flags(image) == {"b": ["auto"]}
        check(image)
        reopen(client, image, read_only=False)
        assert flags(image) == {"b": ["in-use", "auto"]}
        write(client, image.parent, MIB)
        reopen(client, image, read_only=True)
        assert bitmaps(client)["b"]["count"] == 2 * GRANULE
        without_locks = f"driver=qcow2,file.driver=file,file.locking=off,file.filename={image}"
        qemu_img("bitmap", "--remove", "--image-opts", without_locks, "b")
        with pytest.raises(QmpError, match="The image's bitmaps have been changed by somebody"):
            reopen(client, image, read_only=False)
        with pytest.raises(QmpError, match="Cannot export read-only node as writable"):
            write(client, image.parent, MIB)
        client.execute("nbd-server-stop")
        client.execute("blockdev-del", {"node-name": "n"})
        open_image(client, image)
        assert bitmaps(client) == {}
    assert daemon.terminate() == 0
    check(image)


def test_a_refused_reopening_changes_nothing(daemon: Daemon, image: Path) -> None:
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        add(client, "b")
        client.execute("nbd-server-start", {"addr": _address(image.parent)})
        client.execute(
            "block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
        )
        with NbdClient.open(str(image.parent / "nbd.sock"), "n") as guest:
            guest.write(0, b"g" * 4096)
            with pytest.raises(QmpError, match="cannot support read-write users"):
                reopen(client, image, read_only=True)
            assert flags(image) == {"b": ["in-use", "auto"]}
            guest.write(MIB, b"g" * 4096)
            assert guest.read(0, 4096) == guest.read(MIB, 4096) == b"g" * 4096
            guest.disconnect()
        client.execute("nbd-server-stop")
        assert bitmaps(client)["b"]["count"] == 2 * GRANULE
    assert daemon.terminate() == 0
    check(image)
    assert flags(image) == {"b": ["auto"]}


def reopen(client: QmpClient, image: Path, *, read_only: bool) -> None:
    file = {"driver": "file", "filename": str(image)}
    options = {"driver": "qcow2", "node-name": "n", "read-only": read_only, "file": file}
    client.execute("blockdev-reopen", {"options": [options]})


def test_after_a_kill_they_are_inconsistent(daemon: Daemon, image: Path) -> None:
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        add(client, "stored")
        client.execute("blockdev-del", {"node-name": "n"})
        open_image(client, image)
        add(client, "new")
        write(client, image.parent, *range(0, 8 * MIB, MIB))
    daemon.kill()
    assert flags(image) == {"stored": ["in-use", "auto"]}
    daemon.start()
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        told = client.wait_event("BLOCK_DIRTY_BITMAP_RECOVERED")["data"]
        why = {"reason": "crash-unrecoverable", "inconsistent": True}
        assert told == {"node-name": "n", "name": "stored", **why}
        ((name, info),) = bitmaps(client).items()
        assert name == "stored"
        assert why.items() <= info.items()
        assert "remove it, and do a full backup" in daemon.log()
        with pytest.raises(QmpError, match="Bitmap 'stored' is inconsistent and cannot be used"):
            client.execute("block-dirty-bitmap-clear", {"node": "n", "name": "stored"})
        with pytest.raises(QmpError, match="Bitmap 'stored' is inconsistent and cannot be used"):
            client.execute("block_resize", {"node-name": "n", "size": 128 * MIB})
        client.execute("block-dirty-bitmap-remove", {"node": "n", "name": "stored"})
        assert flags(image) == {}
        client.execute("block_resize", {"node-name": "n", "size": 128 * MIB})
        add(client, "stored")
        write(client, image.parent, 0)
        client.execute("blockdev-del", {"node-name": "n"})
    check(image)
    assert flags(image) == {"stored": ["auto"]}


def test_many_of_them_and_one_that_is_all_dirty(daemon: Daemon, image: Path) -> None:
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        for number in range(200):
            add(client, f"bitmap {number}")
        client.execute("nbd-server-start", {"addr": _address(image.parent)})
        client.execute(
            "block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
        )
        guest = NbdClient.open(str(image.parent / "nbd.sock"), "n")
        for offset in range(0, 64 * MIB, 8 * MIB):
            guest.write(offset, b"g" * (8 * MIB))
        guest.close()
        client.execute("nbd-server-stop")
        client.execute("blockdev-del", {"node-name": "n"})
        check(image)
        assert len(flags(image)) == 200
        qemu_io(image, "write 0 4k")
        open_image(client, image)
        assert {each["count"] for each in bitmaps(client).values()} == {64 * MIB}


def _address(directory: Path) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(directory / "nbd.sock")}}


def test_damage_in_the_directory_costs_bitmaps_and_no_disk(daemon: Daemon, image: Path) -> None:
    """QEMU refuses the image. Here it opens, and QEMU takes it again afterwards.

    What the bitmaps took is free again after the next open, whoever it is that opens it.
    """
    qemu_img("bitmap", "--add", image, "b")
    content = image.read_bytes()
    at = content.index(b"b".ljust(8, b"\0"), content.index(struct.pack(">I", 0x23852875)) + 32)
    with image.open("r+b") as file:
        # The flags of its only entry.
        file.seek(at - 12)
        file.write(b"\xff")
    with pytest.raises(AssertionError, match="doesn't satisfy the constraints"):
        qemu_io(image, "quit")
    with QmpClient(daemon.qmp_path) as client:
        open_image(client, image)
        told = client.wait_event("BLOCK_IMAGE_CORRUPTED", node_name="n", fatal=False)
        assert "bitmaps in the image are damaged" in told["data"]["msg"]
        assert bitmaps(client) == {}
        # Before any write, so that nobody believes them after a crash.
        assert flags(image) == {}
        add(client, "new")
        write(client, image.parent, 0, 5 * MIB)
        client.execute("blockdev-del", {"node-name": "n"})
        assert "doesn't satisfy the constraints" in daemon.log()
        copy = image.with_suffix(".copy")
        shutil.copy(image, copy)
        qemu_io(copy, "read -P 0x67 5M 4k", "write 6M 4k")
        check(copy)
        open_image(client, image)
        assert bitmaps(client)["new"]["count"] == 2 * GRANULE
        client.execute("blockdev-del", {"node-name": "n"})
    qemu_io(image, "read -P 0x67 5M 4k")
    check(image)
