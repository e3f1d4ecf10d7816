"""The published bitmap vectors, on both programs, as a guest and a client see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool
from tests.helpers.vectors import named

VECTORS = named("bitmap.json", "bitmaps")


@pytest.fixture(params=["ours", "peer"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QmpClient]:
    program: Daemon | Peer
    if request.param == "ours":
        program = Daemon(tmp_path)
        program.start()
        connection: Any = program.qmp_path
    else:
        require_tool("qemu-storage-daemon")
        program = Peer(tmp_path)
        connection = program.start()
    with QmpClient(connection) as client:
        yield client
    program.kill()


def test_vectors(client: QmpClient, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
    client.execute("nbd-server-start", {"addr": address})
    for number, vector in enumerate(VECTORS.values()):
        node = f"n{number}"
        make_node(client, tmp_path / node, node, vector["size"])
        record(client, tmp_path, node, "b", vector)
        if "merge" in vector:
            client.execute("block-dirty-bitmap-disable", {"node": node, "name": "b"})
            record(client, tmp_path, node, "other", vector["merge"])
            merge = {"node": node, "target": "b", "bitmaps": ["other"]}
            client.execute("block-dirty-bitmap-merge", merge)
        bitmap = {"node": node, "name": "b"}
        digest = client.execute("x-debug-block-dirty-bitmap-sha256", bitmap)
        assert digest == {"sha256": vector["sha256"]}, vector["name"]
        assert count(client, node, "b") == vector["count"], vector["name"]


def make_node(client: QmpClient, path: Path, name: str, size_bytes: int) -> None:
    path.write_bytes(bytes(size_bytes))
    file = {"driver": "file", "filename": str(path)}
    client.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})
    export = {"type": "nbd", "id": name, "node-name": name, "writable": True}
    client.execute("block-export-add", export)


def record(
    client: QmpClient, directory: Path, node: str, name: str, vector: dict[str, Any]
) -> None:
    """A bitmap of what a guest writes."""
    bitmap = {"node": node, "name": name, "granularity": vector["granularity"]}
    client.execute("block-dirty-bitmap-add", bitmap)
    with closing(NbdClient.open(str(directory / "nbd.sock"), node)) as guest:
        for offset, length in vector["writes"]:
            guest.write(offset, b"x" * length)


def count(client: QmpClient, node: str, name: str) -> int:
    nodes = {each["node-name"]: each for each in client.execute("query-named-block-nodes")}
    bitmaps = {bitmap["name"]: bitmap for bitmap in nodes[node]["dirty-bitmaps"]}
    counted: int = bitmaps[name]["count"]
    return counted
