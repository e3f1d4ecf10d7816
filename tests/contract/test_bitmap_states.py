"""The published table of a bitmap's states: every command in every state, on a real daemon."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.qcow2 import qemu_img
from tests.helpers.qmp_client import QmpClient, QmpError

TABLE = json.loads((Path(__file__).parents[2] / "protocol" / "states" / "bitmap.json").read_text())
STATES: dict[str, dict[str, bool]] = TABLE["states"]
NEXT: dict[str, dict[str, str | None]] = TABLE["next"]

#: More than a job copies before it sleeps for its speed limit.
DISK_BYTES = 3 << 20
BACKUP = {"job-id": "j", "device": "n", "target": "t", "sync": "full", "speed": 1}
BITMAP = {"node": "n", "name": "b"}

#: What is sent for each entry of the table.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, BITMAP)
        for name in (
            *(f"block-dirty-bitmap-{verb}" for verb in ("enable", "disable", "clear", "remove")),
            "x-debug-block-dirty-bitmap-sha256",
        )
    },
    "block-dirty-bitmap-merge, target": (
        "block-dirty-bitmap-merge",
        {"node": "n", "target": "b", "bitmaps": ["other"]},
    ),
    "block-dirty-bitmap-merge, source": (
        "block-dirty-bitmap-merge",
        {"node": "n", "target": "other", "bitmaps": ["b"]},
    ),
    "blockdev-backup": (
        "blockdev-backup",
        {**BACKUP, "job-id": "k", "target": "u", "bitmap": "b", "bitmap-mode": "never"}
        | {"sync": "bitmap", "auto-finalize": False},
    ),
    "job-cancel": ("job-cancel", {"id": "j"}),
}

IN_USE = "Bitmap 'b' is currently in use by another operation and cannot be used"
REFUSALS = {
    "in use": IN_USE,
    "in use, disabled": IN_USE,
    "inconsistent": "Bitmap 'b' is inconsistent and cannot be used",
}


@pytest.fixture
def client(daemon: Daemon, tmp_path: Path) -> Iterator[QmpClient]:
    with QmpClient(daemon.qmp_path) as client:
        for name in ("n", "t", "u"):
            (tmp_path / name).write_bytes(b"x" * DISK_BYTES)
            add_node(client, "raw", name, tmp_path / name)
        client.execute("block-dirty-bitmap-add", {"node": "n", "name": "other"})
        yield client


def add_node(client: QmpClient, driver: str, name: str, path: Path) -> None:
    file = {"driver": "file", "filename": str(path)}
    client.execute("blockdev-add", {"driver": driver, "node-name": name, "file": file})


def make_inconsistent(client: QmpClient, directory: Path) -> None:
    """The disk is an image now that was copied while its bitmap was in use."""
    image, copy = directory / "image", directory / "copy"
    client.execute("blockdev-del", {"node-name": "n"})
    qemu_img("create", "-f", "qcow2", image, str(DISK_BYTES))
    qemu_img("bitmap", "--add", image, "b")
    add_node(client, "qcow2", "n", image)
    shutil.copy(image, copy)
    client.execute("blockdev-del", {"node-name": "n"})
    add_node(client, "qcow2", "n", copy)
    client.execute("block-dirty-bitmap-add", {"node": "n", "name": "other"})


def put_in_state(client: QmpClient, state: str, directory: Path) -> None:
    if state == "inconsistent":
        make_inconsistent(client, directory)
        return
    disabled = not STATES[state]["recording"]
    client.execute("block-dirty-bitmap-add", {**BITMAP, "disabled": disabled})
    if STATES[state]["busy"]:
        client.execute("blockdev-backup", {**BACKUP, "bitmap": "b", "bitmap-mode": "on-success"})


def state_of(client: QmpClient) -> str | None:
    nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes")}
    bitmaps = {bitmap.get("name"): bitmap for bitmap in nodes["n"]["dirty-bitmaps"]}
    if "b" not in bitmaps:
        return None
    flags = ("recording", "busy", "inconsistent")
    shown = {flag: bitmaps["b"][flag] for flag in flags if flag in bitmaps["b"]}
    return next(state for state, flags in STATES.items() if flags == shown)


def test_the_table_knows_the_commands() -> None:
    assert STATES.keys() == NEXT.keys()
    assert {command for row in NEXT.values() for command in row} == COMMANDS.keys()


def tidy_up(client: QmpClient) -> None:
    for job in client.execute("query-jobs"):
        client.execute("job-cancel", {"id": job["id"]})
    if state_of(client) is not None:
        client.execute("block-dirty-bitmap-remove", BITMAP)


@pytest.mark.parametrize("state", STATES)
def test_every_command_in_every_state(state: str, client: QmpClient, tmp_path: Path) -> None:
    for entry, (command, arguments) in COMMANDS.items():
        put_in_state(client, state, tmp_path)
        assert state_of(client) == state
        if entry in NEXT[state]:
            client.execute(command, arguments)
            assert state_of(client) == NEXT[state][entry], entry
        else:
            with pytest.raises(QmpError) as refused:
                client.execute(command, arguments)
            why = "Job not found" if entry == "job-cancel" else REFUSALS[state]
            assert refused.value.description == why, entry
            assert state_of(client) == state, entry
        tidy_up(client)
