"""The Unix socket that QMP clients connect to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Dispatcher
from blockd.qmp.monitor import Monitor
from blockd.qmp.services import Services

_log = logging.getLogger(__name__)


class QmpServer:
    """Serves any number of clients at ``path``; each has a negotiation and a queue of its own."""

    def __init__(self, path: str, services: Services) -> None:
        self._path = path
        self._bus = services.bus
        self._dispatcher = Dispatcher(COMMANDS, services)
        self._monitors: set[Monitor] = set()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take clients until ``close``. Raises ``BlockdError`` where the socket can't be had."""
        sock = _listen(self._path)
        identity = os.stat(self._path)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                    task_status.started()
                    await trio.serve_listeners(
                        self._serve_client, [listener], handler_nursery=nursery
                    )
        finally:
            _remove(self._path, identity)
            self._ended.set()

    async def close(self) -> None:
        """Send what is still to be sent, disconnect the clients, remove the socket."""
        async with trio.open_nursery() as nursery:
            for monitor in self._monitors:
                nursery.start_soon(monitor.finish)
        self._scope.cancel()
        await self._ended.wait()

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        """The boundary of one client: what goes wrong with it ends it alone."""
        monitor = Monitor(stream, self._dispatcher, self._bus)
        self._monitors.add(monitor)
        try:
            async with stream:
                await monitor.serve()
        except* trio.BrokenResourceError:
            _log.info("a QMP client was lost")
        except* Exception:  # noqa: BLE001 - the boundary
            _log.exception("a QMP client's connection failed")
        finally:
            self._monitors.discard(monitor)


def _listen(path: str) -> socket.socket:
    """A listening socket that only its owner may connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _locked(os.path.dirname(path) or "."):
            _make_way(path)
            sock.bind(path)
            # Nobody can connect before `listen`: the mode is right from the first client on.
            os.chmod(path, 0o600)
            sock.listen(limits.LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise BlockdError(f"QMP socket '{path}' can't be made: {reason}") from error
    except BlockdError:
        sock.close()
        raise
    return sock


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Two daemons that start at once must not take each other's socket for a stale one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make_way(path: str) -> None:
    """Remove a socket that nobody serves any more. Raises ``BlockdError`` for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BlockdError(f"QMP socket '{path}' can't be made: something else is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        outcome = probe.connect_ex(path)
    if outcome != errno.ECONNREFUSED:
        raise BlockdError(f"QMP socket '{path}' is in use by another process")
    os.unlink(path)


def _remove(path: str, identity: os.stat_result) -> None:
    """Remove our socket, and no other that has taken its place."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), identity):
            os.unlink(path)
