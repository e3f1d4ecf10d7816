"""Images in use: put on a live disk, and opened a second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qcow2 import check, qemu_img
from tests.helpers.qmp_client import QmpClient, QmpError

MIB = 1 << 20


def add_image(client: QmpClient, name: str, path: Path) -> None:
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(path)}
    client.execute("blockdev-add", file)
    node = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": None}
    client.execute("blockdev-add", node)


def serve(client: QmpClient, node: str, path: Path) -> NbdClient:
    address = {"type": "unix", "data": {"path": str(path)}}
    client.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": True}
    client.execute("block-export-add", export)
    return NbdClient.open(str(path), "e")


def test_a_disk_is_the_same_through_overlays_that_are_put_on_it(
    daemon: Daemon, tmp_path: Path
) -> None:
    base, *overlays = (tmp_path / name for name in ("base", "one", "two"))
    base.write_bytes(b"b" * 4 * MIB)
    disk = bytearray(base.read_bytes())
    with QmpClient(daemon.qmp_path) as client:
        file = {"driver": "file", "filename": str(base)}
        client.execute("blockdev-add", {"driver": "raw", "node-name": "base", "file": file})
        with serve(client, "base", tmp_path / "nbd.sock") as guest:
            below = "base"
            for number, overlay in enumerate(overlays, start=1):
                qemu_img("create", "-q", "-f", "qcow2", overlay, str(4 * MIB))
                add_image(client, overlay.name, overlay)
                arguments = {"node": below, "overlay": overlay.name}
                client.execute("blockdev-snapshot", arguments)
                below = overlay.name
                start, data = number * MIB - 1000, bytes([number]) * 70_000
                guest.write(start, data)
                disk[start : start + len(data)] = data
            assert guest.read(0, 4 * MIB) == disk
            guest.disconnect()
    assert daemon.terminate() == 0
    assert base.read_bytes() == b"b" * 4 * MIB
    assert same_chain(tmp_path, base, *overlays).read_bytes() == disk
    for overlay in overlays:
        assert check(overlay).get("leaks", 0) == 0


def same_chain(directory: Path, base: Path, *overlays: Path) -> Path:
    """What QEMU reads through the images."""
    chain: dict[str, object] = {"driver": "raw", "file": protocol(base)}
    for overlay in overlays:
        chain = {"driver": "qcow2", "file": protocol(overlay), "backing": chain}
    flat = directory / "flat"
    qemu_img("convert", "-O", "raw", f"json:{json.dumps(chain)}", flat)
    return flat


def protocol(path: Path) -> dict[str, object]:
    return {"driver": "file", "filename": str(path)}


def test_an_image_that_is_being_written_to_is_not_repaired(daemon: Daemon, tmp_path: Path) -> None:
    """The dirty bit in its file does not say that anybody has crashed."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, str(4 * MIB))
    with QmpClient(daemon.qmp_path) as client:
        add_image(client, "image", path)
        with serve(client, "image", tmp_path / "nbd.sock") as guest:
            guest.write(0, b"x" * MIB)
            guest.flush()
            before = path.read_bytes()
            second = {"driver": "qcow2", "node-name": "second", "file": "image-file"}
            with pytest.raises(QmpError, match="Permission conflict on node 'image-file'"):
                client.execute("blockdev-add", second)
            assert path.read_bytes() == before
            guest.disconnect()
    assert daemon.terminate() == 0
    assert check(path).get("leaks", 0) == 0


def test_nobody_relies_on_a_bitmap_in_an_image_that_is_being_written_to(
    daemon: Daemon, tmp_path: Path
) -> None:
    """In the image it would call clean what has changed, and a backup would lack it."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", image, str(MIB))
    qemu_img("bitmap", "--add", image, "b")
    with QmpClient(daemon.qmp_path) as client:
        add_image(client, "disk", image)
        with serve(client, "disk", tmp_path / "nbd.sock") as guest:
            assert flags(image) == ["in-use", "auto"]
            guest.write(0, b"new")
            guest.disconnect()
    assert daemon.terminate() == 0
    assert flags(image) == ["auto"]


def test_an_image_is_not_read_while_another_node_writes_to_it(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Its tables would not be those that were read, and the writer could not let it grow."""
    image, overlay = tmp_path / "image", tmp_path / "overlay"
    qemu_img("create", "-q", "-f", "qcow2", image, str(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", overlay)

    def options(name: str, path: Path, *, read_only: bool) -> dict[str, object]:
        return {
            "driver": "qcow2",
            "node-name": name,
            "read-only": read_only,
            "file": protocol(path),
        }

    with QmpClient(daemon.qmp_path) as client:
        client.execute("blockdev-add", options("disk", image, read_only=False))
        refusal = 'Could not open backing file: Failed to get shared "resize" lock'
        with pytest.raises(QmpError, match=refusal):
            client.execute("blockdev-add", options("overlay", overlay, read_only=False))
        reopened = options("disk", image, read_only=True)
        client.execute("blockdev-reopen", {"options": [reopened]})
        client.execute("blockdev-add", options("overlay", overlay, read_only=False))
        with pytest.raises(QmpError, match='Failed to get "write" lock'):
            client.execute("blockdev-add", options("second", image, read_only=False))
        client.execute("blockdev-del", {"node-name": "overlay"})
        reopened["read-only"] = False
        client.execute("blockdev-reopen", {"options": [reopened]})
    assert daemon.terminate() == 0


def flags(image: Path) -> list[str]:
    told = json.loads(qemu_img("info", "-U", "--output=json", image))
    (bitmap,) = told["format-specific"]["data"]["bitmaps"]
    return list(bitmap["flags"])


def test_nobody_relies_on_the_size_of_an_image_that_grows(daemon: Daemon, tmp_path: Path) -> None:
    """Or else the guest's writes would find no room as soon as somebody looks at the file."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, str(4 * MIB))
    refused = 'Failed to get shared "resize" lock'
    with QmpClient(daemon.qmp_path) as client:
        add_image(client, "image", path)
        for driver in ("qcow2", "raw"):
            second = {"driver": driver, "node-name": "second", "read-only": True}
            with pytest.raises(QmpError, match=refused):
                client.execute("blockdev-add", {**second, "file": protocol(path)})


def test_an_image_that_others_stand_on_is_not_opened_for_writing(
    daemon: Daemon, tmp_path: Path
) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, str(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with QmpClient(daemon.qmp_path) as client:
        disk = {"driver": "qcow2", "node-name": "disk", "file": protocol(top)}
        client.execute("blockdev-add", disk)
        second = {"driver": "qcow2", "node-name": "second", "file": protocol(base)}
        with pytest.raises(QmpError, match='Failed to get "write" lock'):
            client.execute("blockdev-add", second)
        client.execute("blockdev-add", {**second, "read-only": True})
