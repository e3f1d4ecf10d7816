"""A disk of a real daemon, with a bitmap and a guest that writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.qmp_client import QmpClient


class GuestDisk:
    """The raw node ``disk`` over the file of that name, with the bitmap ``b``."""

    def __init__(self, daemon: Daemon, client: QmpClient, content: bytes) -> None:
        self.daemon = daemon
        self.client = client
        self.directory = daemon.directory
        self.image = self.directory / "disk"
        self.image.write_bytes(content)
        file = {"driver": "file", "filename": str(self.image)}
        client.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
        client.execute("block-dirty-bitmap-add", {"node": "disk", "name": "b"})
        path = str(self.directory / "nbd.sock")
        client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        client.execute(
            "block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "writable": True}
        )
        self.guest = NbdClient.open(path, "disk")

    @classmethod
    @contextmanager
    def of(cls, daemon: Daemon, content: bytes) -> Iterator[Self]:
        with QmpClient(daemon.qmp_path) as client:
            disk = cls(daemon, client, content)
            with disk.guest:
                yield disk
