"""NBD servers of other people, each in a process of its own, over a Unix socket."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tools import require_tool


class NbdProcess:
    """``command`` serves at ``socket_path``, also again after ``kill``."""

    def __init__(self, command: list[str], socket_path: Path, log_path: Path | None = None) -> None:
        """``log_path``: for what it says on standard error, which is ours otherwise."""
        self.socket_path = socket_path
        self._log_path = log_path
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it takes connections: the socket is made, listens, and is then inherited.

        Both servers take a listening socket as systemd gives it, so nobody has to wait for them.
        """
        self.socket_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(self.socket_path))
            listening.listen(16)
            os.set_inheritable(listening.fileno(), True)
            # The number that systemd's protocol prescribes, and the process that it is meant for.
            script = f'exec 3<&{listening.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            with ExitStack() as stack:
                log = stack.enter_context(self._log_path.open("ab")) if self._log_path else None
                self._process = subprocess.Popen(
                    ["/bin/bash", "-c", script, "bash", *self._command],
                    pass_fds=[listening.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None


@contextmanager
def serving(
    command: list[str], socket_path: Path, log_path: Path | None = None
) -> Iterator[NbdProcess]:
    """The server, while the body runs."""
    process = NbdProcess(command, socket_path, log_path)
    process.start()
    try:
        yield process
    finally:
        process.kill()


def qemu_nbd(image: Path, *options: str) -> list[str]:
    """Any number of clients, also after the last has gone."""
    command = [require_tool("qemu-nbd"), "--persistent", "--shared=0", "--format=raw"]
    return [*command, "--discard=unmap", *options, str(image)]


def nbdkit(*arguments: str) -> list[str]:
    """Plugin and filters as given."""
    return [require_tool("nbdkit"), "--foreground", *arguments]
