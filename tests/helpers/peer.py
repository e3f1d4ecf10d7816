"""A real qemu-storage-daemon in a process of its own."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from tests.helpers.daemon import end_of
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
        """Start it; a connection to its monitor."""
        return self.start_with_monitors(1)[0]

    def start_with_monitors(self, count: int) -> list[socket.socket]:
        """Start it; connections to ``count`` monitors.

        Each monitor gets a connected socket: a client that connects while the peer starts is
        sometimes greeted twice or never.
        """
        pairs = [socket.socketpair() for _ in range(count)]
        options: list[str] = []
        for number, (_, theirs) in enumerate(pairs):
            options += ["--chardev", f"socket,id=qmp{number},fd={theirs.fileno()}"]
            options += ["--monitor", f"chardev=qmp{number}"]
        with (self.directory / "peer.log").open("wb") as log:
            self._process = subprocess.Popen(
                [require_tool("qemu-storage-daemon"), *options],
                pass_fds=[theirs.fileno() for _, theirs in pairs],
                # Python ignores SIGXFSZ, and so does blockd: a write over the limit is EFBIG.
                restore_signals=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for _, theirs in pairs:
            theirs.close()
        return [ours for ours, _ in pairs]

    def wait(self) -> int:
        """Wait for the daemon to end; return its exit status. One that hangs is killed."""
        assert self._process is not None
        return end_of(self._process)

    def kill(self) -> None:
        """SIGKILL, and wait; nothing happens where it has ended."""
        assert self._process is not None
        self._process.kill()
        self.wait()
