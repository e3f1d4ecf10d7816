"""What clients are told of the same images by both programs, in every meta context."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.peer import Peer
from tests.helpers.qcow2 import qemu_img, qemu_io
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool

MIB = 1 << 20
SIZE = 16 * MIB
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")


def run(*command: str) -> str:
    done = subprocess.run(
        [require_tool(command[0]), *command[1:]],
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def make_images(directory: Path) -> None:
    """A chain of three and a sparse file, with data, holes and zeroes of every kind."""
    with (directory / "raw.img").open("wb") as raw:
        for at in (0, 3 * MIB, 3 * MIB + 65536, 9 * MIB):
            raw.seek(at)
            raw.write(random.Random(at).randbytes(40_000))
        raw.truncate(SIZE)
    base, middle, top = (directory / f"{name}.qcow2" for name in ("base", "middle", "top"))
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    for image, below in ((middle, base), (top, middle)):
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, image, str(SIZE))
    qemu_io(base, "write -P 1 0 1M", "write -P 1 4M 64k", "write -z 5M 1M", "write -P 2 6M 2M")
    qemu_io(middle, "write -P 3 512k 1M", "write -z 4M 64k", "write -P 4 10M 5k")
    qemu_io(top, "write -P 5 768k 64k", "write -z -u 6M 64k", "discard 512k 64k", "write 15M 1M")


class Server:
    """One of the programs, with both disks exported."""

    def __init__(self, qmp: QmpClient, directory: Path, images: Path) -> None:
        self._socket = directory / "nbd.sock"
        raw = {"driver": "file", "filename": str(images / "raw.img")}
        self._nodes = {"raw": {"driver": "raw", "file": raw}, "chain": chain(images)}
        address = {"type": "unix", "data": {"path": str(self._socket)}}
        qmp.execute("nbd-server-start", {"addr": address})
        for name, options in self._nodes.items():
            qmp.execute("blockdev-add", {"node-name": name, **options})
            qmp.execute("block-dirty-bitmap-add", {"node": name, "name": "b"})
            export = {"type": "nbd", "id": name, "node-name": name, "writable": True}
            export |= {"bitmaps": ["b"], "allocation-depth": True}
            qmp.execute("block-export-add", export)

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self._socket}"

    def map(self, export: str, context: str) -> list[tuple[int, int, int]]:
        told = json.loads(run("nbdinfo", "--json", f"--map={context}", self.uri(export)))
        return [(each["offset"], each["length"], each["type"]) for each in told]

    def qemus_map(self, export: str) -> list[tuple[int, int, bool, bool]]:
        told = json.loads(run("qemu-img", "map", "--output=json", self.uri(export)))
        return [(each["start"], each["length"], each["data"], each["zero"]) for each in told]


def chain(images: Path) -> dict[str, Any]:
    node: dict[str, Any] | None = None
    for name in ("base", "middle", "top"):
        file = {"driver": "file", "filename": str(images / f"{name}.qcow2")}
        node = {"driver": "qcow2", "file": file} | ({"backing": node} if node else {})
    assert node is not None
    return {**node, "discard": "unmap"}


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    directories = tmp_path / "ours", tmp_path / "peers"
    for directory in directories:
        directory.mkdir()
        make_images(directory)
    ours, peer = Daemon(directories[0]), Peer(directories[1])
    ours.start()
    with QmpClient(peer.start()) as theirs, QmpClient(ours.qmp_path) as mine:
        yield (
            Server(mine, directories[0], directories[0]),
            Server(theirs, directories[1], directories[1]),
        )
    ours.kill()
    peer.kill()


WRITES = """
h.connect_uri(uri)
h.pwrite(b"x" * 100000, 3 << 20)
h.zero(1 << 20, 11 << 20, nbd.CMD_FLAG_FAST_ZERO if h.can_fast_zero() else 0)
h.trim(1 << 20, 0)
h.cache(1 << 20, 0)
h.flush()
"""


@pytest.mark.parametrize("export", ["raw", "chain"])
def test_both_programs_tell_the_same(servers: tuple[Server, Server], export: str) -> None:
    for written in (False, True):
        ours, theirs = servers
        for context in CONTEXTS:
            assert ours.map(export, context) == theirs.map(export, context), (context, written)
        assert ours.qemus_map(export) == theirs.qemus_map(export)
        for server in servers:
            nbdsh(f"uri = {server.uri(export)!r}", WRITES)


@pytest.mark.parametrize("export", ["raw", "chain"])
def test_sparse_copies_have_the_content(
    servers: tuple[Server, Server], export: str, tmp_path: Path
) -> None:
    """nbdcopy goes by block status; qemu-img by its own; without it, it is by holes in reads."""
    ours, theirs = (tmp_path / name for name in ("ours.img", "theirs.img"))
    run("nbdcopy", servers[0].uri(export), str(ours))
    run("nbdcopy", servers[1].uri(export), str(theirs))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_blocks <= theirs.stat().st_blocks
    run("nbdcopy", "--no-extents", servers[0].uri(export), str(ours))
    assert ours.read_bytes() == theirs.read_bytes()
    run("qemu-img", "convert", "-n", "-O", "raw", servers[0].uri(export), str(ours))
    assert ours.read_bytes() == theirs.read_bytes()


def nbdsh(*scripts: str) -> None:
    # It asks for the Python whose packages it came with.
    command = [require_tool("nbdsh")]
    for script in scripts:
        command += ["-c", script]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr.decode()
