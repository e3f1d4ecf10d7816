"""A real blockd in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.patience import PATIENCE_SECONDS


def end_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end; its exit status. One that hangs is killed, and raises."""
    try:
        return process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(PATIENCE_SECONDS)
        raise


class Daemon:
    """``blockd --qmp unix:DIRECTORY/qmp.sock``, started, ended and killed as often as you like.

    What it logs, over all its lives, is in ``DIRECTORY/blockd.log``.
    """

    def __init__(
        self,
        directory: Path,
        program: Sequence[str] = (sys.executable, "-m", "blockd"),
        *,
        options: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """``options``: of the command line, beside ``--qmp``."""
        self.directory = directory
        self.program = program
        self.options = options
        self._pass_fds = pass_fds
        self.qmp_path = directory / "qmp.sock"
        self.log_path = directory / "blockd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def spawn(self, **environment: str) -> None:
        """Start the daemon, and do not wait for it."""
        assert not self.running
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.program, "--qmp", f"unix:{self.qmp_path}", *self.options],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
            )

    def start(self) -> None:
        """Start the daemon; return when it says that it takes connections."""
        notify_path = self.directory / "notify.sock"
        notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(notify_path))
            self.spawn(NOTIFY_SOCKET=str(notify_path))
            self._await_ready(notify)

    def _await_ready(self, notify: socket.socket) -> None:
        """Read what the daemon tells its service manager, which here is us, up to READY."""
        ended = os.pidfd_open(self.pid)
        try:
            while True:
                heard, _, _ = select.select([notify.fileno(), ended], [], [], PATIENCE_SECONDS)
                if notify.fileno() in heard:
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
                    continue
                if not heard:
                    self.kill()
                else:
                    self.wait()
                raise RuntimeError(f"blockd did not start:\n{self.log()}")
        finally:
            os.close(ended)

    def wait(self) -> int:
        """Wait for the daemon to end; return its exit status. One that hangs is killed."""
        assert self._process is not None
        return end_of(self._process)

    def terminate(self) -> int:
        """SIGTERM, and wait; return the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
