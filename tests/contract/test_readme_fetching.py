"""The README's way to let a program fetch backups, word for word, under a guest that writes."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qcow2 import qemu_img
from tests.helpers.qmp_client import QmpClient
from tests.helpers.readme import commands_in_blocks, shell_lines
from tests.helpers.tools import require_tool

DISK_BYTES = 4 << 20
GRANULE = 64 << 10
DIRTY = "qemu:dirty-bitmap:fetched"

#: What a program does that fetches only what is dirty.
FETCH = """
h.add_meta_context("qemu:dirty-bitmap:fetched")
h.connect_uri(uri)
at, size = 0, h.get_size()
with open(path, "r+b") as file:
    while at < size:
        told = []
        h.block_status(size - at, at, lambda context, offset, runs, error: told.extend(runs))
        for length, dirty in zip(told[::2], told[1::2]):
            if dirty:
                file.seek(at)
                file.write(h.pread(length, at))
            at += length
"""


@pytest.fixture
def daemon_options(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state")]


def run(*command: str) -> str:
    program = require_tool(command[0])
    # nbdsh asks for the Python whose packages it came with.
    done = subprocess.run(
        [program, *command[1:]],
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@contextmanager
def hammering(socket: str) -> Iterator[None]:
    """A guest writes all over the disk while the body runs."""
    stop, randoms = Event(), random.Random(3)

    def hammer() -> None:
        with NbdClient.open(socket, "disk") as guest:
            while not stop.is_set():
                length = randoms.choice([512, 4096, 100_000])
                guest.write(randoms.randrange(DISK_BYTES - length), randoms.randbytes(length))

    thread = Thread(target=hammer)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def execute(qmp: QmpClient, commands: list[dict[str, Any]]) -> None:
    for command in commands:
        qmp.execute(command["execute"], command.get("arguments"))
        if command["execute"] == "block-job-cancel":
            qmp.wait_event("BLOCK_JOB_CANCELLED")


def test_the_readme_lets_a_program_fetch_an_instant(daemon: Daemon, tmp_path: Path) -> None:
    for directory in ("srv/vm", "srv/backup", "run/blockd"):
        (tmp_path / directory).mkdir(parents=True)
    disk, held = tmp_path / "srv/vm/disk.img", tmp_path / "held.img"
    disk.write_bytes(random.Random(1).randbytes(DISK_BYTES // 2) + bytes(DISK_BYTES // 2))
    start, *_ = blocks = commands_in_blocks(tmp_path)
    note, begin, end = next(
        blocks[at : at + 3] for at, each in enumerate(blocks) if "fetched" in str(each)
    )
    socket = str(tmp_path / "run/blockd/nbd.sock")
    (create,) = (line for line in shell_lines(tmp_path, "qemu-img") if "old.qcow2" in line[-1])
    with QmpClient(daemon.qmp_path) as qmp:
        execute(qmp, [each for each in start[1:] if "backup" not in each["execute"]])
        execute(qmp, note)
        held.write_bytes(disk.read_bytes())
        with NbdClient.open(socket, "disk") as guest:
            guest.write(5 * GRANULE + 1, b"written since")
            guest.write(20 * GRANULE - 1, b"and here")
        instant = disk.read_bytes()
        qemu_img(*create)
        execute(qmp, begin)
        with hammering(socket):
            fetch(tmp_path, held)
        assert held.read_bytes() == instant
        assert (tmp_path / "srv/backup/fetched.img").read_bytes() == instant
        assert disk.read_bytes() != instant
        execute(qmp, end)
        assert {each["name"] for each in bitmaps(qmp)} == {"fetched", "nightly"}
        check_second_time(qmp, disk, held, begin, end, socket, create)


def bitmaps(qmp: QmpClient) -> list[dict[str, Any]]:
    (node,) = (
        each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "disk"
    )
    found: list[dict[str, Any]] = node["dirty-bitmaps"]
    return found


def fetch(root: Path, held: Path) -> None:
    """By the README's commands, and what is dirty into ``held``, by libnbd."""
    (look,), (copy,) = shell_lines(root, "nbdinfo"), shell_lines(root, "nbdcopy")
    uri = look[-1]
    runs = json.loads(run("nbdinfo", "--json", *look))
    assert [(each["offset"], each["length"]) for each in runs if each["type"]] == [
        (5 * GRANULE, GRANULE),
        (19 * GRANULE, 2 * GRANULE),
    ]
    run("nbdcopy", *copy)
    seen_by_qemu(root, runs)
    values = f"uri = {uri!r}; path = {str(held)!r}"
    run("nbdsh", "-c", values, "-c", FETCH)


def seen_by_qemu(root: Path, runs: list[dict[str, Any]]) -> None:
    """QEMU's client shows what is dirty as holes of the file."""
    server = {"type": "unix", "path": str(root / "run/blockd/nbd.sock")}
    options = {"driver": "nbd", "export": "instant", "server": server, "x-dirty-bitmap": DIRTY}
    name = "json:" + json.dumps(options)
    told = json.loads(run("qemu-img", "map", "--output=json", name))
    dirty = [(each["start"], each["length"]) for each in told if not each["data"]]
    assert dirty == [(each["offset"], each["length"]) for each in runs if each["type"]]


def check_second_time(
    qmp: QmpClient,
    disk: Path,
    held: Path,
    begin: list[dict[str, Any]],
    end: list[dict[str, Any]],
    socket: str,
    create: list[str],
) -> None:
    """What was written under the first one is fetched now."""
    instant = disk.read_bytes()
    qemu_img(*create)
    execute(qmp, begin)
    with hammering(socket):
        uri = f"nbd+unix:///instant?socket={socket}"
        run("nbdsh", "-c", f"uri = {uri!r}; path = {str(held)!r}", "-c", FETCH)
    assert held.read_bytes() == instant
    execute(qmp, end)
