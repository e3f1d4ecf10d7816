"""A disk whose bitmaps outlive its daemon: real processes, killed and started again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from blockd import limits
from blockd.bitmap import Bits
from blockd.qmp.types.event import EVENTS
from blockd.state.disk import HostDisk
from blockd.state.heartbeat import Heartbeat
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qcow2 import qemu_img
from tests.helpers.qmp_client import QmpClient
from tests.helpers.tools import require_tool

KIB = 1024
MIB = 1024 * KIB
DISK_BYTES = 64 * MIB
GRANULE_BYTES = 64 * KIB


class KeptDisk:
    """The node ``disk`` of a daemon with a state directory. ``driver``: raw or qcow2."""

    def __init__(
        self,
        directory: Path,
        *,
        driver: str = "raw",
        image: Path | None = None,
        state: Path | None = None,
    ) -> None:
        """``image``: of which the disk is; None: a new one. ``state``: None for the usual place."""
        self.directory = directory
        self.driver = driver
        self.image = image or self._make_image()
        self.state = state or directory / "state"
        self.target = directory / "target.img"
        self.mark = directory / "target.img.blockd-incomplete"
        self.daemon = Daemon(directory, options=["--state-dir", str(self.state)])
        self.qmp: QmpClient

    def _make_image(self) -> Path:
        image = self.directory / f"disk.{self.driver}"
        qemu_img("create", "-f", self.driver, image, str(DISK_BYTES))
        return image

    # -- the daemon --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemon, and give it the disk; nothing is said of bitmaps."""
        self.daemon.start()
        self.qmp = QmpClient(self.daemon.qmp_path)
        self.open()
        address = {"type": "unix", "data": {"path": str(self.directory / "nbd.sock")}}
        self.qmp.execute("nbd-server-start", {"addr": address})
        self.export()

    def open(self) -> None:
        kind = "host_device" if self.image.is_block_device() else "file"
        file = {"driver": kind, "filename": str(self.image)}
        node = {"driver": self.driver, "node-name": "disk", "discard": "unmap", "file": file}
        self.qmp.execute("blockdev-add", node)

    def export(self) -> None:
        export = {"type": "nbd", "id": "disk", "node-name": "disk", "writable": True}
        self.qmp.execute("block-export-add", export)

    def unexport(self) -> None:
        self.qmp.execute("block-export-del", {"id": "disk", "mode": "hard"})
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def kill(self) -> None:
        self.daemon.kill()
        self.qmp.close()

    def was_killed_long_ago(self) -> None:
        """Put the kill so far back that from now on a write to the image is too late for it."""
        late_ns = limits.STATE_HEARTBEAT_LATE_SECONDS * 10**9
        last_alive_ns = self.image.stat().st_ctime_ns - late_ns
        Heartbeat(HostDisk(str(self.state / "marks"))).note(last_alive_ns)

    def quit(self) -> None:
        self.qmp.execute("quit")
        assert self.daemon.wait() == 0, self.daemon.log()
        self.qmp.close()

    def end(self) -> None:
        """For a test's end, whatever has become of the daemon."""
        if self.daemon.running:
            self.kill()
        assert "Traceback" not in self.daemon.log(), self.daemon.log()

    # -- what is done to the disk ------------------------------------------------------------

    def write(self, granules: Iterable[int], byte: int = 1) -> None:
        """A guest writes 4 KiB into each of these granules, and is answered."""
        with NbdClient.open(str(self.directory / "nbd.sock"), "disk") as client:
            for granule in granules:
                client.write(granule * GRANULE_BYTES + 8 * KIB, bytes([byte]) * 4 * KIB)

    def add_bitmap(self, name: str = "b", **options: Any) -> None:
        options = {"persistent": True, "granularity": GRANULE_BYTES, **options}
        self.qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": name, **options})

    def change_bitmap(self, verb: str, name: str = "b") -> None:
        self.qmp.execute(f"block-dirty-bitmap-{verb}", {"node": "disk", "name": name})

    def begin_backup(self, sync: str, **options: Any) -> None:
        backup = {"job-id": "backup", "device": "disk", "target": str(self.target)}
        mode = "existing" if self.target.exists() else "absolute-paths"
        options = {"format": "raw", "mode": mode, "bitmap": "b", **options}
        if sync == "full":
            options = {"bitmap-mode": "on-success", **options}
        self.qmp.execute("drive-backup", {**backup, "sync": sync, **options})

    def begin_slow_backup(self, sync: str) -> None:
        """Return when it has copied one piece, and sleeps for longer than any test takes."""
        self.begin_backup(sync, speed=1)
        self.wait_for_the_first_piece()

    def wait_for_the_first_piece(self) -> None:
        """Of a job that has just begun, and is slow."""
        job: dict[str, Any] = {"current-progress": 0}
        while not job["current-progress"]:
            (job,) = self.qmp.execute("query-jobs")
        assert job["current-progress"] < job["total-progress"]

    def back_up(self, sync: str) -> None:
        self.begin_backup(sync)
        end = self.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert "error" not in end["data"], end

    def hear(self, name: str) -> dict[str, Any]:
        """The data of the next such event, which are as declared."""
        data: dict[str, Any] = self.qmp.wait_event(name)["data"]
        (declared,) = (event for event in EVENTS if event.event == name)
        msgspec.convert(data, declared)
        return data

    # -- what is known of it -----------------------------------------------------------------

    def infos(self) -> dict[str, dict[str, Any]]:
        """The bitmaps by name, as a query shows them."""
        rows = self.qmp.execute("query-named-block-nodes", {"flat": True})
        (row,) = (row for row in rows if row["node-name"] == "disk")
        return {info["name"]: info for info in row.get("dirty-bitmaps", [])}

    def check_dirty(self, granules: Iterable[int], name: str = "b") -> None:
        """These granules are dirty, and no others."""
        bits = Bits(DISK_BYTES, GRANULE_BYTES)
        for granule in granules:
            bits.mark(granule * GRANULE_BYTES, GRANULE_BYTES)
        info = self.infos()[name]
        assert info["count"] == bits.count_bytes, info
        arguments = {"node": "disk", "name": name}
        digest = self.qmp.execute("x-debug-block-dirty-bitmap-sha256", arguments)
        assert digest == {"sha256": bits.digest()}

    def check_all_dirty(self, reason: str, name: str = "b") -> None:
        """Every granule is, and a query says why."""
        info = self.infos()[name]
        size = self.image.stat().st_size if self.driver == "raw" else DISK_BYTES
        assert info["count"] == -(-size // GRANULE_BYTES) * GRANULE_BYTES, info
        assert info["reason"] == reason, info

    def same_as_target(self) -> bool:
        """Whether the backup is, byte by byte, what the disk is."""
        tool = require_tool("qemu-img")
        command = [tool, "compare", "-U", "-f", self.driver, "-F", "raw", "-q"]
        compared = subprocess.run([*command, str(self.image), str(self.target)], check=False)
        assert compared.returncode in {0, 1}
        return compared.returncode == 0
