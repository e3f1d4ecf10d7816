"""Clients of several kinds, fifty at once, one that reads nothing, more than can be taken."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import qemu.qmp

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient

EACH_KIND = 25
ROUNDS = 4


def make_disk(qmp: QmpClient, directory: Path) -> str:
    """A node ``disk``, and an NBD server; its socket's path."""
    (directory / "disk.img").write_bytes(bytes(1 << 20))
    file = {"driver": "file", "filename": str(directory / "disk.img")}
    qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
    nbd_path = str(directory / "nbd.sock")
    qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": nbd_path}}})
    return nbd_path


def export(name: str) -> dict[str, str]:
    return {"type": "nbd", "id": name, "node-name": "disk", "name": name[:100]}


# -- fifty at once -------------------------------------------------------------------------------


def test_fifty_clients_of_two_kinds_at_once(daemon: Daemon, tmp_path: Path) -> None:
    """Each makes and deletes what is its own, and hears of what all of them delete."""
    with QmpClient(daemon.qmp_path) as qmp:
        make_disk(qmp, tmp_path)
        with ThreadPoolExecutor(EACH_KIND + 1) as threads:
            library = threads.submit(lambda: asyncio.run(all_by_the_library(daemon.qmp_path)))
            raw = [
                threads.submit(by_hand, daemon.qmp_path, f"raw{number}")
                for number in range(EACH_KIND)
            ]
            for each in (library, *raw):
                each.result()
        assert qmp.execute("query-block-exports") == []
        names = [f"{kind}{number}" for kind in ("lib", "raw") for number in range(EACH_KIND)]
        heard = [qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]["id"] for _ in names * ROUNDS]
        assert sorted(heard) == sorted(names * ROUNDS)


def by_hand(path: Path, name: str) -> None:
    with QmpClient(path) as qmp:
        for _ in range(ROUNDS):
            assert qmp.execute("block-export-add", export(name)) == {}
            assert name in [each["id"] for each in qmp.execute("query-block-exports")]
            assert qmp.execute("block-export-del", {"id": name}) == {}
            qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)


async def all_by_the_library(path: Path) -> None:
    await asyncio.gather(*(by_the_library(path, f"lib{n}") for n in range(EACH_KIND)))


async def by_the_library(path: Path, name: str) -> None:
    client = qemu.qmp.QMPClient(name)
    with client.listener("BLOCK_EXPORT_DELETED") as deleted:
        await client.connect(str(path))
        for _ in range(ROUNDS):
            assert await client.execute("block-export-add", {**export(name)}) == {}
            exports: Any = await client.execute("query-block-exports")
            assert name in [each["id"] for each in exports]
            assert await client.execute("block-export-del", {"id": name}) == {}
            while dict(await deleted.get())["data"] != {"id": name}:
                pass
        await client.disconnect()


# -- qmp-shell -----------------------------------------------------------------------------------


def test_the_shell_of_qemu(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    lines = [
        "query-version",
        f"blockdev-add driver=file node-name=disk filename={tmp_path}/disk.img",
        "block-dirty-bitmap-add node=disk name=b granularity=4096 disabled=true",
        "object-add qom-type=secret id=s data=hunter2",
        "no-such-command",
    ]
    shell = subprocess.run(
        [f"{sysconfig.get_path('scripts')}/qmp-shell", daemon.qmp_path],
        input="\n".join(lines) + "\n",
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert "Connected to QEMU 10.0.2" in shell.stdout
    replies = [
        json.loads(text) for text in re.findall(r"^\(QEMU\) (\{.*)$", shell.stdout, re.MULTILINE)
    ]
    assert replies[0]["return"]["package"].startswith("blockd ")
    assert replies[1:] == [
        {"return": {}},
        {"return": {}},
        {"return": {}},
        {
            "error": {
                "class": "CommandNotFound",
                "desc": "The command no-such-command has not been found",
            }
        },
    ]
    audit = [line for line in daemon.log().splitlines() if "audit:" in line]
    assert [re.findall("command=(\\S+) .*result=(.*)", line) for line in audit] == [
        [("blockdev-add", "ok")],
        [("block-dirty-bitmap-add", "ok")],
        [("object-add", "ok")],
    ]
    assert "hunter2" not in daemon.log()


# -- one that reads nothing ----------------------------------------------------------------------


def test_a_client_that_reads_no_events_is_dropped_and_nobody_waits(
    daemon: Daemon, tmp_path: Path
) -> None:
    lazy = connect(str(daemon.qmp_path))
    lazy.sendall(b'{"execute": "qmp_capabilities"}')
    with QmpClient(daemon.qmp_path) as qmp:
        make_disk(qmp, tmp_path)
        # An event of 100 KB each: 200 of them are more than a socket and the queue hold together.
        for number in range(200):
            name = f"e{number}".ljust(100_000, "x")
            qmp.execute("block-export-add", export(name))
            qmp.execute("block-export-del", {"id": name})
            assert qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": name}
        assert daemon.log().count("was dropped: it left more than 16777216 bytes unread") == 1
        got = 0
        while data := lazy.recv(1 << 20):
            got += len(data)
        assert got < 20_000_000
        assert qmp.execute("query-block-exports") == []
    lazy.close()


# -- out of descriptors --------------------------------------------------------------------------


def test_out_of_descriptors_new_clients_wait_and_all_others_go_on(
    daemon: Daemon, tmp_path: Path
) -> None:
    with QmpClient(daemon.qmp_path) as qmp:
        nbd_path = make_disk(qmp, tmp_path)
        qmp.execute("block-export-add", export("disk"))
        guest = NbdClient.open(nbd_path, "disk")
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        used = 1 + max(int(fd) for fd in os.listdir(f"/proc/{daemon.pid}/fd"))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        waiting = [connect(path) for path in (nbd_path, str(daemon.qmp_path)) for _ in range(9)]
        for _ in range(100):
            assert qmp.execute("query-jobs") == []
            assert guest.read(0, 4) == bytes(4)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        for client in waiting:
            assert client.recv(7) in (b"NBDMAGI", b'{"QMP":')
            client.close()
        guest.close()
    assert daemon.log().count("can't be accepted") <= 2


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_SECONDS)
    client.connect(path)
    return client
