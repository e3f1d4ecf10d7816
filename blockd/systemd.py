"""Tells the service manager how the daemon is: sd_notify(3) and sd_watchdog_enabled(3).

And takes sockets from it: sd_listen_fds(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

import trio

from blockd.errors import BlockdError

_log = logging.getLogger(__name__)

_FIRST_PASSED_FD = 3


def passed_socket(name: str, environ: Mapping[str, str] = os.environ) -> int:
    """The descriptor of a socket that the service manager has opened for the daemon.

    ``name``: its name in the unit (``FileDescriptorName=``), or the descriptor's number. No other
    descriptor can be had: the daemon needs them itself. Raises ``BlockdError``.
    """
    ours = environ.get("LISTEN_PID") == str(os.getpid())
    count = int(environ.get("LISTEN_FDS", 0)) if ours else 0
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for number in range(count):
        fd = _FIRST_PASSED_FD + number
        if name in (str(fd), *names[number : number + 1]):
            return fd
    raise BlockdError(f"The service manager has passed no socket '{name}'")


class ServiceManager:
    """Whoever started the daemon and wants to hear from it; nobody, where ``environ`` says so.

    Messages are single datagrams, sent without waiting: a manager that does not read them never
    holds up the daemon, and one that is gone is only logged.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # "@name" stands for a socket in the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_seconds = int(environ.get("WATCHDOG_USEC", 0)) / 1e6 if watched else 0.0

    def ready(self) -> None:
        """The daemon takes connections from now on."""
        self._notify("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to end."""
        self._notify("STOPPING=1")

    async def watchdog(self) -> None:
        """Say "alive" twice in each watchdog interval, for ever; return if nobody watches.

        It runs as a task of the event loop, so that a loop that hangs falls silent.
        """
        while self._watchdog_seconds:
            self._notify("WATCHDOG=1")
            await trio.sleep(self._watchdog_seconds / 2)

    def _notify(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            _log.warning("cannot tell the service manager %s: %s", message, error)
