"""A real qemu-storage-daemon in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.helpers.daemon import PATIENCE_SECONDS
from tests.helpers.tools import require_tool


class Peer:
    """One run of qemu-storage-daemon; what it prints is in ``DIRECTORY/peer.log``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> socket.socket:
        """Start it; a connection to its monitor.

        The monitor gets a connected socket: a client that connects while the peer starts is
        sometimes greeted twice or never.
        """
        ours, theirs = socket.socketpair()
        program = require_tool("qemu-storage-daemon")
        chardev = f"socket,id=qmp,fd={theirs.fileno()}"
        with theirs, (self.directory / "peer.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "--chardev", chardev, "--monitor", "chardev=qmp"],
                pass_fds=[theirs.fileno()],
                # Python ignores SIGXFSZ, and so does blockd: a write over the limit is EFBIG.
                restore_signals=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return ours

    def wait(self) -> int:
        """Wait for the daemon to end; return its exit status. One that hangs is killed."""
        assert self._process is not None
        try:
            return self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
