"""Chains of overlays made while a guest writes, and files that a refused command must spare."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qcow2 import check, qemu_img
from tests.helpers.qmp_client import QmpClient, QmpError

MIB = 1024 * 1024
DISK_BYTES = 4 * MIB
DISK = random.Random(1).randbytes(DISK_BYTES)
OTHER = random.Random(2).randbytes(300_005)


@pytest.fixture
def directory(daemon: Daemon) -> Path:
    return daemon.directory


@pytest.fixture
def qmp(daemon: Daemon, directory: Path) -> Iterator[QmpClient]:
    """A client of a daemon with the node ``disk``, exported to write."""
    (directory / "disk.img").write_bytes(DISK)
    with QmpClient(daemon.qmp_path) as qmp:
        add_raw(qmp, "disk", str(directory / "disk.img"))
        address = {"type": "unix", "data": {"path": str(directory / "nbd.sock")}}
        qmp.execute("nbd-server-start", {"addr": address})
        options = {"type": "nbd", "id": "e", "node-name": "disk", "name": "d", "writable": True}
        qmp.execute("block-export-add", options)
        yield qmp


def add_raw(qmp: QmpClient, name: str, filename: str) -> None:
    file = {"driver": "file", "filename": filename}
    qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})


def sync(qmp: QmpClient, node: str, overlay: str, file: Path | str, **more: Any) -> None:
    arguments = {"node-name": node, "snapshot-node-name": overlay, "snapshot-file": str(file)}
    qmp.execute("blockdev-snapshot-sync", arguments | more)


class Guest(threading.Thread):
    """Writes at random until it is told to stop; ``disk`` is what it was told is there."""

    def __init__(self, client: NbdClient) -> None:
        super().__init__()
        self.client = client
        self.disk = bytearray(DISK)
        self.stop = threading.Event()
        self.written = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            chance = random.Random(3)
            while not self.stop.is_set():
                length = chance.choice((1, 512, 4096, 70_000))
                offset = chance.randrange(DISK_BYTES - length)
                data = chance.randbytes(length)
                self.client.write(offset, data)
                self.disk[offset : offset + length] = data
                self.written += 1
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.error = error

    def wait_written(self, count: int) -> None:
        """Return when it has written that many more."""
        until = self.written + count
        while self.written < until and self.error is None:
            self.join(0.001)


def test_a_guest_writes_on_while_a_chain_grows(qmp: QmpClient, directory: Path) -> None:
    client = NbdClient.open(str(directory / "nbd.sock"), "d")
    guest = Guest(client)
    guest.start()
    below = "disk"
    for number in range(6):
        guest.wait_written(40)
        sync(qmp, below, f"o{number}", directory / f"o{number}.q")
        below = f"o{number}"
    guest.wait_written(40)
    guest.stop.set()
    guest.join()
    assert guest.error is None
    assert client.read(0, DISK_BYTES) == guest.disk
    client.disconnect()
    qmp.execute("block-export-del", {"id": "e"})
    assert qmp.execute("query-named-block-nodes")[0]["node-name"] == "disk"
    for number in range(6):
        checked = check(directory / f"o{number}.q")
        assert not checked.get("corruptions")
        assert not checked.get("leaks")
    qemu_img("convert", "-O", "raw", directory / "o5.q", directory / "restored.img")
    assert (directory / "restored.img").read_bytes() == guest.disk


def test_a_node_below_an_overlay_is_free_for_readers(qmp: QmpClient, directory: Path) -> None:
    """A backup program may read what does not change any more, also with QEMU's tools."""
    sync(qmp, "disk", "o", directory / "o.q")
    qemu_img("convert", "-f", "raw", "-O", "raw", directory / "disk.img", directory / "copy.img")
    assert (directory / "copy.img").read_bytes() == DISK
    sync(qmp, "o", "p", directory / "p.q")
    qemu_img("compare", directory / "o.q", directory / "copy.img")


@pytest.mark.parametrize(
    ("disk", "overlay", "told"),
    [
        ("disk.img", "o.q", "disk.img"),
        ("sub/disk.img", "sub/o.q", "DIR/sub/disk.img"),
        ("disk.img", "sub/o.q", "DIR/disk.img"),
        ("DIR/disk.img", "o.q", "DIR/disk.img"),
    ],
)
def test_an_overlay_names_its_backing_file_so_that_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, overlay: str, told: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    os.mkdir("sub")
    for name in ("disk.img", "sub/disk.img"):
        Path(name).write_bytes(DISK)
    daemon = Daemon(tmp_path)
    daemon.start()
    with QmpClient(daemon.qmp_path) as qmp:
        add_raw(qmp, "disk", disk.replace("DIR", str(tmp_path)))
        sync(qmp, "disk", "o", overlay)
        qmp.execute("quit")
    assert daemon.wait() == 0
    info = json.loads(qemu_img("info", "--output=json", overlay))
    assert info["backing-filename"] == told.replace("DIR", str(tmp_path))
    qemu_img("compare", overlay, disk.replace("DIR", str(tmp_path)))


def test_a_chain_is_opened_again_that_no_header_told_of(qmp: QmpClient, directory: Path) -> None:
    """The second overlay names the first one with all that that one stands on."""
    qemu_img("create", "-f", "qcow2", directory / "o.q", "4M")
    file = {"driver": "file", "filename": str(directory / "o.q")}
    qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": file})
    qmp.execute("blockdev-snapshot", {"node": "disk", "overlay": "o"})
    with NbdClient.open(str(directory / "nbd.sock"), "d") as guest:
        guest.write(5, b"one")
        sync(qmp, "o", "p", directory / "p.q")
        guest.write(70_000, b"two")
        seen = guest.read(0, DISK_BYTES)
    qmp.execute("block-export-del", {"id": "e", "mode": "hard"})
    for name in ("o", "disk"):
        qmp.execute("blockdev-del", {"node-name": name})
    qemu_img("convert", "-O", "raw", directory / "p.q", directory / "restored.img")
    assert (directory / "restored.img").read_bytes() == seen
    file = {"driver": "file", "filename": str(directory / "p.q")}
    qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "p", "file": file})
    export = {"type": "nbd", "id": "p", "node-name": "p"}
    qmp.execute("block-export-add", export)
    with NbdClient.open(str(directory / "nbd.sock"), "p") as guest:
        assert guest.read(0, DISK_BYTES) == seen
    (top,) = (each for each in named_nodes(qmp) if each["node-name"] == "p")
    assert top["backing_file_depth"] == 2
    assert top["file"] == str(directory / "p.q")


def named_nodes(qmp: QmpClient) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = qmp.execute("query-named-block-nodes")
    return nodes


BAD_NAMES = {
    "itself": (
        'json:{"driver": "qcow2", "file.driver": "file", "file.filename": "DIR/a.q"}',
        "GenericError: Could not open backing file: More than 120 nodes would stand",
    ),
    "no json": ("json:{", "Could not parse the JSON options"),
    "no object": ("json:3", "Could not parse the JSON options"),
    "no driver": ('json:{"file.filename": "DIR/a.q"}', "Parameter 'driver' is missing"),
    "another's option": (
        'json:{"driver": "file", "filename": "DIR/disk.img", "x": 1}',
        "Parameter 'x' is unexpected",
    ),
}


@pytest.mark.parametrize(("name", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_a_bad_name_of_a_backing_file_is_told(
    qmp: QmpClient, directory: Path, name: str, message: str
) -> None:
    named = name.replace("DIR", str(directory))
    image = directory / "a.q"
    qemu_img("create", "-f", "qcow2", image, "4M")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", named, image)
    file = {"driver": "file", "filename": str(image)}
    nodes = named_nodes(qmp)
    with pytest.raises(QmpError, match=message):
        qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "a", "file": file})
    assert named_nodes(qmp) == nodes


# --- files that are somebody's data -----------------------------------------------------------


def listing(directory: Path) -> dict[str, tuple[bytes, int]]:
    """The images there: their content and who may read them."""
    return {
        each.name: (each.read_bytes(), each.stat().st_mode)
        for each in directory.iterdir()
        if each.suffix in (".img", ".q")
    }


def refused(qmp: QmpClient, directory: Path, file: Path, message: str, **more: Any) -> None:
    before, nodes = listing(directory), qmp.execute("query-named-block-nodes")
    with pytest.raises(QmpError, match=message):
        sync(qmp, "disk", "o", file, **more)
    assert listing(directory) == before
    assert qmp.execute("query-named-block-nodes") == nodes


@pytest.fixture
def target_above(qmp: QmpClient, directory: Path) -> None:
    """A job fills a node on top of ``disk``, which is found out late."""
    (directory / "source.img").write_bytes(DISK)
    add_raw(qmp, "source", str(directory / "source.img"))
    qmp.execute("blockdev-add", {"driver": "raw", "node-name": "above", "file": "disk"})
    qmp.execute("block-export-del", {"id": "e"})
    job = {"job-id": "j", "device": "source", "target": "above", "sync": "none"}
    qmp.execute("blockdev-backup", job)


@pytest.mark.usefixtures("target_above")
@pytest.mark.parametrize("before", [None, b"", OTHER])
def test_a_late_refusal_puts_back_what_was_there(
    qmp: QmpClient, directory: Path, before: bytes | None
) -> None:
    file = directory / "o.q"
    if before is not None:
        file.write_bytes(before)
        file.chmod(0o640)
    refused(qmp, directory, file, "Node 'above' is busy")


def test_what_was_there_is_replaced_for_the_same_readers(qmp: QmpClient, directory: Path) -> None:
    file = directory / "o.q"
    file.write_bytes(OTHER)
    file.chmod(0o640)
    names = {each.name for each in directory.iterdir()}
    sync(qmp, "disk", "o", file)
    assert {each.name for each in directory.iterdir()} == names
    assert file.stat().st_mode & 0o777 == 0o640
    assert json.loads(qemu_img("info", "-U", "--output=json", file))["virtual-size"] == DISK_BYTES


def test_a_file_is_made_where_a_link_leads(qmp: QmpClient, directory: Path) -> None:
    (directory / "link.q").symlink_to("real.q")
    (directory / "real.q").write_bytes(OTHER)
    sync(qmp, "disk", "o", directory / "link.q")
    assert (directory / "link.q").is_symlink()
    assert (directory / "real.q").read_bytes()[:4] == b"QFI\xfb"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("disk.img", "same filename as the backing file"),
        ("link.img", "is in use: node '#block001' stands on it|Failed to get"),
        ("used.q", "Failed to get"),
    ],
)
def test_a_file_in_use_is_not_touched(
    qmp: QmpClient, directory: Path, name: str, message: str
) -> None:
    (directory / "link.img").symlink_to("disk.img")
    qemu_img("create", "-f", "qcow2", directory / "used.q", "1M")
    file = {"driver": "file", "filename": str(directory / "used.q")}
    qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "used", "file": file})
    refused(qmp, directory, directory / name, message)


def test_a_bad_name_is_found_out_before_a_file_is_made(qmp: QmpClient, directory: Path) -> None:
    refused(qmp, directory, directory / "o.q", "Invalid node-name", **{"snapshot-node-name": "1"})


def test_an_overlay_that_is_refused_after_all_is_closed(qmp: QmpClient, directory: Path) -> None:
    """Opened again at once: nothing of it is left."""
    qemu_img("create", "-f", "qcow2", directory / "small.q", "1M")
    for _ in range(2):
        refused(qmp, directory, directory / "small.q", "is smaller", mode="existing")
    sync(qmp, "disk", "o", directory / "o.q")


# --- in transactions --------------------------------------------------------------------------


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def sync_action(node: str, overlay: str, file: Path, **more: Any) -> dict[str, Any]:
    names = {"node_name": node, "snapshot_node_name": overlay, "snapshot_file": str(file)}
    return action("blockdev-snapshot-sync", **names, **more)


def add_bitmap(node: str) -> dict[str, Any]:
    return action("block-dirty-bitmap-add", node=node, name="b")


def test_a_transaction_that_is_refused_puts_back_what_was_there(
    qmp: QmpClient, directory: Path
) -> None:
    (directory / "o.q").write_bytes(OTHER)
    before, nodes = listing(directory), qmp.execute("query-named-block-nodes")
    actions = [sync_action("disk", "o", directory / "o.q"), add_bitmap("o"), add_bitmap("nobody")]
    with pytest.raises(QmpError, match="nobody"):
        qmp.execute("transaction", {"actions": actions})
    assert listing(directory) == before
    assert qmp.execute("query-named-block-nodes") == nodes
    qmp.execute("transaction", {"actions": actions[:2]})
    assert qmp.execute("query-block-exports")[0]["node-name"] == "o"


def test_a_dry_run_makes_no_file(qmp: QmpClient, directory: Path) -> None:
    (directory / "there.q").write_bytes(OTHER)
    qemu_img("create", "-f", "qcow2", directory / "image.q", "4M")
    before, nodes = listing(directory), qmp.execute("query-named-block-nodes")
    for name, more in (
        ("new.q", {}),
        ("there.q", {}),
        ("image.q", {"mode": "existing"}),
    ):
        actions = [
            sync_action("disk", "o", directory / name, **more),
            add_bitmap("o"),
            sync_action("disk", "p", directory / "p.q"),
            sync_action("disk", "q", directory / "q.q", format="wat"),
        ]
        answer = qmp.execute("transaction", {"actions": actions, "dry-run": True})
        errors = [each.get("error", {}).get("desc") for each in answer["actions"]]
        assert errors[:2] == [None, None]
        assert errors[2] == "Node 'disk' is busy: node is used as backing hd of 'o'"
        assert errors[3] == errors[2]
    assert listing(directory) == before
    assert qmp.execute("query-named-block-nodes") == nodes


def test_headers_are_true_of_chains_made_at_one_instant(qmp: QmpClient, directory: Path) -> None:
    """An overlay's header is written before what it stands on is settled, so that is refused."""
    qemu_img("create", "-f", "qcow2", directory / "o.q", "4M")
    file = {"driver": "file", "filename": str(directory / "o.q")}
    qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": file})
    put = action("blockdev-snapshot", node="disk", overlay="o")
    files = [directory / "p.q", directory / "q.q"]
    for first, second, message in (
        (put, sync_action("o", "p", files[0]), "was put on another"),
        (sync_action("disk", "p", files[0]), sync_action("p", "q", files[1]), "was made by this"),
    ):
        with pytest.raises(QmpError, match=message):
            qmp.execute("transaction", {"actions": [first, second]})
        assert not any(each.exists() for each in files)
