"""The README's commands, word for word, against a real daemon."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blockd.__main__ import _parser
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qcow2 import qemu_img
from tests.helpers.qmp_client import QmpClient
from tests.helpers.readme import README, commands_in_blocks, shell_lines
from tests.helpers.tools import require_tool

DISK_BYTES = 1 << 20
UNIT = README.parent / "systemd" / "blockd.service"


@pytest.fixture
def daemon_options(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state")]


def make_disk(root: Path) -> Path:
    """The README's disk and directories."""
    for directory in ("srv/vm", "srv/backup", "run/blockd"):
        (root / directory).mkdir(parents=True)
    disk = root / "srv/vm/disk.img"
    disk.write_bytes(b"before" + bytes(DISK_BYTES - 6))
    return disk


def carry_out(qmp: QmpClient, commands: list[dict[str, Any]], *, backups: int = 1) -> None:
    """All the commands, of which the last begins so many backups; and wait for those."""
    for command in commands:
        qmp.execute(command["execute"], command.get("arguments"))
    for _ in range(backups):
        completed = qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert "error" not in completed["data"]


def test_the_readme_leads_to_a_backup_like_the_disk(daemon: Daemon, tmp_path: Path) -> None:
    disk, backup = make_disk(tmp_path), tmp_path / "srv/backup/disk.img"
    log = tmp_path / "srv/vm/log.img"
    log.write_bytes(b"log" + bytes(DISK_BYTES - 3))
    first, second, full, above, several, *_ = commands_in_blocks(tmp_path)
    create, check, convert, *_ = shell_lines(tmp_path, "qemu-img")
    assert first[0] == {"execute": "qmp_capabilities"}
    with QmpClient(daemon.qmp_path) as qmp:
        carry_out(qmp, first[1:])
        assert backup.read_bytes() == disk.read_bytes()
        guest = NbdClient.open(str(tmp_path / "run/blockd/nbd.sock"), "disk")
        guest.write(DISK_BYTES // 2, b"written since")
        carry_out(qmp, second)
        assert b"written since" in backup.read_bytes()
        assert backup.read_bytes() == disk.read_bytes()
        carry_out(qmp, full)
        guest.write(DISK_BYTES // 4, b"and later")
        qemu_img(*create)
        carry_out(qmp, above)
        qemu_img(*check)
        qemu_img(*convert)
        assert (tmp_path / "srv/vm/restored.img").read_bytes() == disk.read_bytes()
        carry_out(qmp, several, backups=2)
        assert backup.read_bytes() == disk.read_bytes()
        assert (tmp_path / "srv/backup/log.img").read_bytes() == log.read_bytes()
        guest.close()


def test_the_readme_takes_a_file_out_of_a_chain(daemon: Daemon, tmp_path: Path) -> None:
    disk, backups = make_disk(tmp_path), tmp_path / "srv/backup"
    start, _, full, above, *_ = commands_in_blocks(tmp_path)
    create, *_ = shell_lines(tmp_path, "qemu-img")
    inline = re.findall(r"`qemu-img ((?:commit|rebase) [^`]*)`", README.read_text())
    commit, (*rebase, last) = (command.split() for command in inline)
    assert last == "wednesday.qcow2"

    def on(day: str, below: str, command: Any) -> Any:
        return json.loads(json.dumps(command).replace("tuesday", day).replace("monday", below))

    with QmpClient(daemon.qmp_path) as qmp:
        carry_out(qmp, start[1:])
        carry_out(qmp, full)
        with NbdClient.open(str(tmp_path / "run/blockd/nbd.sock"), "disk") as guest:
            for below, day in pairwise(["monday", "tuesday", "wednesday"]):
                guest.write(len(day), day.encode())
                qemu_img(*on(day, below, create))
                carry_out(qmp, on(day, below, above))
    qemu_img(*commit, backups / "tuesday.qcow2")
    (backups / "tuesday.qcow2").unlink()
    qemu_img(*rebase, backups / last)
    qemu_img("convert", "-O", "raw", backups / last, tmp_path / "restored.img")
    assert (tmp_path / "restored.img").read_bytes() == disk.read_bytes()


def test_the_readme_gives_a_service_its_disks(daemon: Daemon, tmp_path: Path) -> None:
    """By those of its first commands that are needed after every start."""
    make_disk(tmp_path)
    first, *_ = commands_in_blocks(tmp_path)
    needed = [each for each in first if not re.search("bitmap|backup", each["execute"])]
    commands = tmp_path / "disks.qmp"
    commands.write_text("".join(f"{json.dumps(each)}\n" for each in needed))
    require_tool("socat")
    (script,) = re.findall(r"^    sudo (socat .*)$", README.read_text(), re.MULTILINE)
    script = script.replace("/run/blockd/qmp.sock", str(daemon.qmp_path))
    script = script.replace("/etc/blockd/disks.qmp", str(commands))
    command = ["/bin/bash", "-e", "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.splitlines()[1:] == [b'{"return":{}}'] * len(needed)
    NbdClient.open(str(tmp_path / "run/blockd/nbd.sock"), "disk").close()


@pytest.mark.parametrize("path", [README, UNIT], ids=["readme", "unit"])
def test_blockd_has_the_options_that_it_is_started_with(path: Path) -> None:
    # Who is let in there need not be known here.
    text = re.sub("libvirt-qemu|monitoring", "root", path.read_text())
    lines = re.findall(r"^[^#\n`]*\bblockd (--qmp .*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert _parser().parse_args(line.split()).qmp == "/run/blockd/qmp.sock"


def test_the_readme_leads_to_clients_with_certificates(daemon: Daemon, tmp_path: Path) -> None:
    server, client = tmp_path / "etc/blockd/tls", tmp_path / "etc/nbd"
    for directory in (server, client):
        directory.mkdir(parents=True)
    make_certificates(tmp_path)
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        shutil.copy(tmp_path / name, server)
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        shutil.copy(tmp_path / name, client)
    *_, commands = commands_in_blocks(tmp_path)
    # The port may be somebody else's.
    commands[-1]["arguments"]["addr"] = {"type": "unix", "data": {"path": str(tmp_path / "s")}}
    uri = f"nbds+unix:///?socket={tmp_path / 's'}&tls-verify-peer=true&tls-certificates="
    with QmpClient(daemon.qmp_path) as qmp:
        carry_out(qmp, commands, backups=0)
        for credentials, gets_in in ((client, True), (tmp_path, True), (server, False)):
            command = [require_tool("nbdinfo"), "--list", uri + str(credentials)]
            done = subprocess.run(
                command, check=False, capture_output=True, timeout=PATIENCE_SECONDS
            )
            assert (done.returncode == 0) == gets_in


def test_the_readme_makes_certificates_that_make_no_others(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    for name, authority in (("ca", True), ("server", False), ("client", False)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(tmp_path / f"{name}-cert.pem")
        assert context.cert_store_stats()["x509_ca"] == authority


def make_certificates(directory: Path) -> None:
    """As the README's shell commands do."""
    (script,) = re.findall(r'^(    new=".*?)\n\n', README.read_text(), re.MULTILINE | re.DOTALL)
    require_tool("openssl")
    command = ["/bin/bash", "-e", "-c", script]
    subprocess.run(
        command, cwd=directory, check=True, capture_output=True, timeout=PATIENCE_SECONDS
    )
