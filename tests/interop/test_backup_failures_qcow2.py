"""Backups to qcow2 files that fail, are killed, or tried again: what the target says and has."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.guest_disk import GuestDisk
from tests.helpers.qcow2 import check, qemu_img
from tests.helpers.qmp_client import QmpClient

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB
DISK = random.Random(5).randbytes(SIZE)


class Setting(GuestDisk):
    """A disk, and the qcow2 file that its backups go to."""

    def __init__(self, daemon: Daemon, client: QmpClient, content: bytes) -> None:
        super().__init__(daemon, client, content)
        self.target = self.directory / "target"
        self.mark = self.directory / "target.blockd-incomplete"

    def start(self, command: str = "drive-backup", **more: Any) -> None:
        arguments = {"job-id": "j", "device": "disk", "bitmap": "b", "sync": "bitmap"}
        if command == "drive-backup":
            arguments |= {"target": str(self.target), "format": "qcow2"}
        arguments |= {name.replace("_", "-"): value for name, value in more.items()}
        self.client.execute(command, arguments)

    def end(self) -> bool:
        """Whether it went well."""
        end = self.client.wait_event("BLOCK_JOB_COMPLETED")
        self.client.wait_event("JOB_STATUS_CHANGE", status="null")
        return "error" not in end["data"]

    def add_target(self, *, broken: bool = False) -> None:
        """The node ``t`` over the target, which takes writes only up to the third MiB if broken."""
        file: dict[str, Any] = {"driver": "file", "filename": str(self.target)}
        image: dict[str, Any] = {"driver": "qcow2", "file": file}
        if broken:
            error = {"event": "none", "iotype": "write", "sector": 3 * MIB // 512}
            image = {"driver": "blkdebug", "image": image, "inject-error": [error]}
        self.client.execute("blockdev-add", {"node-name": "t", **image})

    def remove_target(self) -> None:
        self.client.execute("blockdev-del", {"node-name": "t"})

    def needs(self) -> dict[str, Any]:
        needs: dict[str, Any] = json.loads(self.mark.read_bytes())["needs"]
        return needs

    def check_restored(self) -> None:
        check(self.target)
        qemu_img("compare", "-U", "-f", "raw", "-F", "qcow2", self.image, self.target)


@pytest.fixture
def setting(daemon: Daemon) -> Iterator[Setting]:
    with Setting.of(daemon, DISK) as setting:
        yield setting


def write_everywhere(setting: Setting, byte: int) -> None:
    for offset in (0, MIB + 5, 3 * MIB, SIZE - 512):
        setting.guest.write(offset, bytes([byte]) * 512)


@pytest.mark.parametrize("mode", ["on-success", "always"])
def test_a_backup_that_failed_is_marked_until_it_is_made_again(setting: Setting, mode: str) -> None:
    setting.start(sync="full", bitmap_mode="on-success")
    assert setting.end()
    assert not setting.mark.exists()
    write_everywhere(setting, 1)
    setting.add_target(broken=True)
    setting.start("blockdev-backup", target="t", bitmap_mode=mode)
    assert not setting.end()
    setting.remove_target()
    assert [each["name"] for each in setting.needs()["bitmaps"]] == ["b"]
    setting.guest.write(2 * MIB, b"2" * 512)
    setting.start(mode="existing", bitmap_mode=mode)
    assert setting.end()
    assert not setting.mark.exists()
    setting.check_restored()


@pytest.mark.parametrize(("mode", "complete"), [("on-success", True), ("always", False)])
def test_a_layer_made_anew_is_complete_where_the_bitmap_has_kept_all(
    setting: Setting,
    mode: str,
    complete: bool,
) -> None:
    setting.start(sync="full", bitmap_mode="on-success")
    assert setting.end()
    full = setting.directory / "full"
    setting.target.rename(full)
    write_everywhere(setting, 1)
    qemu_img("create", "-f", "qcow2", setting.target, str(SIZE))
    setting.add_target(broken=True)
    setting.start("blockdev-backup", target="t", bitmap_mode=mode)
    assert not setting.end()
    setting.remove_target()
    setting.start(bitmap_mode=mode)
    assert setting.end()
    assert setting.mark.exists() != complete
    if complete:
        qemu_img("rebase", "-u", "-b", full, "-F", "qcow2", setting.target)
        setting.check_restored()
    else:
        assert setting.needs()["full"]


@pytest.mark.parametrize("command", ["drive-backup", "blockdev-backup"])
def test_a_target_is_marked_while_the_job_runs_and_after_a_kill(
    setting: Setting, command: str
) -> None:
    more: dict[str, Any] = {}
    if command == "blockdev-backup":
        qemu_img("create", "-f", "qcow2", setting.target, str(SIZE))
        setting.add_target()
        more = {"target": "t"}
    setting.start(command, sync="full", bitmap_mode="on-success", speed=1, **more)
    setting.client.wait_event("JOB_STATUS_CHANGE", status="running")
    while not setting.client.execute("query-block-jobs")[0]["offset"]:
        pass
    assert setting.needs()["full"]
    setting.daemon.kill()
    assert setting.needs()["full"]


def test_zeroes_take_no_room(setting: Setting) -> None:
    """Also those that are written in the disk's file, and no holes."""
    setting.guest.write(0, bytes(3 * MIB))
    setting.start(sync="full", bitmap_mode="on-success")
    assert setting.end()
    setting.check_restored()
    # No more clusters than the disk has are taken at once, and those not needed are given back.
    assert setting.target.stat().st_size < SIZE + 2 * MIB
    held = json.loads(qemu_img("map", "--output=json", setting.target))
    assert sum(run["length"] for run in held if run["data"]) == MIB
