"""A daemon with one of everything in it: nodes, bitmaps, an export, and a job in each state.

The same for blockd and for the peer, so that what they say of it can be compared.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.helpers.qmp_client import QmpClient, QmpError

#: More than a job copies before it sleeps for its speed limit.
DISK_BYTES = (1 << 20) + (1 << 16)

#: Whose job, if any, copies from or to it, and what it has.
NODES = {
    "src": "running: has bitmaps 'busy' and 'idle', exported as 'exp'",
    "dst": "running",
    "src-paused": "",
    "dst-paused": "",
    "src-pending": "",
    "dst-pending": "",
    "src-concluded": "",
    "dst-concluded": "",
    "free": "has bitmaps 'idle' and 'off'",
    "spare": "",
}
JOBS = ("running", "paused", "pending", "concluded")

#: Times, which go on by themselves.
_VOLATILE = {"idle_time_ns"}


class BusyDaemon:
    """``client``'s daemon, whose files are in ``directory``; arguments may hold ``DIR`` for it."""

    def __init__(self, client: QmpClient, directory: Path) -> None:
        self.client = client
        self.directory = directory

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        sent = json.dumps(arguments or {}).replace("DIR", str(self.directory))
        return self.client.execute(command, json.loads(sent))

    def answer(self, command: str, arguments: dict[str, Any]) -> tuple[str, str] | None:
        """The class and description of the refusal; None where it was carried out."""
        try:
            self.execute(command, arguments)
        except QmpError as error:
            said = error.description.replace(str(self.directory), "DIR")
            return error.error_class, re.sub(r"#block\d+", "#block", said)
        return None

    def fill(self) -> None:
        """Make everything."""
        for node in NODES:
            (self.directory / f"{node}.img").write_bytes(b"x" * DISK_BYTES)
            file = {"driver": "file", "filename": f"DIR/{node}.img"}
            self.execute("blockdev-add", {"driver": "raw", "node-name": node, "file": file})
        for node, name in (("src", "busy"), ("src", "idle"), ("free", "idle"), ("free", "off")):
            bitmap = {"node": node, "name": name, "disabled": name == "off"}
            self.execute("block-dirty-bitmap-add", bitmap)
        address = {"type": "unix", "data": {"path": "DIR/nbd.sock"}}
        self.execute("nbd-server-start", {"addr": address})
        self.execute("block-export-add", {"type": "nbd", "id": "exp", "node-name": "src"})
        self.execute("object-add", {"qom-type": "secret", "id": "obj", "data": "x"})
        self._start_jobs()

    def _start_jobs(self) -> None:
        self._back_up("concluded", {"auto-dismiss": False})
        self.client.wait_event("JOB_STATUS_CHANGE", id="concluded", status="concluded")
        self._back_up("pending", {"auto-finalize": False})
        self.client.wait_event("BLOCK_JOB_PENDING", id="pending")
        self._back_up("paused", {"speed": 1})
        self._wait_asleep("paused")
        self.client.events.clear()
        self.execute("job-pause", {"id": "paused"})
        self.client.wait_event("JOB_STATUS_CHANGE", id="paused", status="paused")
        bitmap = {"bitmap": "busy", "bitmap-mode": "on-success"}
        self._back_up("running", {"speed": 1, "device": "src", "target": "dst", **bitmap})
        self._wait_asleep("running")

    def _back_up(self, job: str, options: dict[str, Any]) -> None:
        disks = {"device": f"src-{job}", "target": f"dst-{job}"}
        self.execute("blockdev-backup", {"job-id": job, "sync": "full", **disks, **options})

    def _wait_asleep(self, job: str) -> None:
        """Until a slow job has copied something: it sleeps then."""
        progress = 0
        while not progress:
            jobs = {each["id"]: each for each in self.client.execute("query-jobs")}
            progress = jobs[job]["current-progress"]

    def everything(self, questions: list[str]) -> dict[str, Any]:
        """The answers to ``questions``, and what files there are."""
        told = {name: _lasting(self.client.execute(name)) for name in questions}
        return told | {"files": sorted(path.name for path in self.directory.iterdir())}


def _lasting(value: Any) -> Any:
    match value:
        case dict():
            return {key: _lasting(item) for key, item in value.items() if key not in _VOLATILE}
        case list():
            return [_lasting(item) for item in value]
    return value
