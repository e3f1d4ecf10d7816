"""The Unix socket that QMP clients connect to."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import trio

from blockd.errors import BlockdError
from blockd.listener import Listener, UnixAddress, listen
from blockd.qmp import wire
from blockd.qmp.access import AccessList, Client, Credentials, Role
from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Dispatcher, describe
from blockd.qmp.monitor import Monitor
from blockd.qmp.services import Services

_log = logging.getLogger(__name__)


class QmpServer:
    """Serves any number of clients at ``path``; each has a negotiation and a queue of its own.

    ``access_list`` says who they may be. Without one the file's mode does: the daemon's own user.
    """

    def __init__(self, path: str, services: Services, access_list: AccessList | None) -> None:
        self._path = path
        self._access_list = access_list
        self._clients = itertools.count(1)
        self._bus = services.bus
        self._dispatcher = Dispatcher(COMMANDS, services)
        self._monitors: set[Monitor] = set()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take clients until ``close``. Raises ``BlockdError`` where the socket can't be had."""
        with _only_one_starts(self._path):
            mode = 0o600 if self._access_list is None else 0o666
            listener = listen(UnixAddress(self._path, mode))
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    await self._accept(listener, nursery)
        finally:
            listener.close()
            self._ended.set()

    async def close(self) -> None:
        """Send what is still to be sent, disconnect the clients, remove the socket."""
        async with trio.open_nursery() as nursery:
            for monitor in self._monitors:
                nursery.start_soon(monitor.finish)
        self._scope.cancel()
        await self._ended.wait()

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> NoReturn:
        (sock,) = listener.sockets
        while True:
            await trio.lowlevel.wait_readable(sock)
            client = await listener.accept(sock)
            if client is not None:
                nursery.start_soon(self._serve_client, client)

    async def _serve_client(self, sock: socket.socket) -> None:
        """The boundary of one client: what goes wrong with it ends it alone."""
        try:
            with sock:
                client = self._admit(sock)
                if client is not None:
                    await self._talk(client, trio.socket.from_stdlib_socket(sock))
        except* trio.BrokenResourceError:
            _log.info("a QMP client was lost")
        except* Exception:  # noqa: BLE001 - the boundary
            _log.exception("a QMP client's connection failed")

    def _admit(self, sock: socket.socket) -> Client | None:
        """The client, or None: it may not be one, and has been told so as far as it listens."""
        credentials = Credentials.of(sock)
        role = Role.FULL if self._access_list is None else self._access_list.role_of(credentials)
        if role is not None:
            return Client(next(self._clients), credentials, role)
        _log.warning("QMP: uid %d, pid %d was refused", credentials.uid, credentials.pid)
        refusal = BlockdError(f"User {credentials.uid} is not allowed to use this QMP socket")
        failure = describe(refusal)
        with suppress(OSError):
            sock.send(wire.failure(failure.error_class, failure.message, {}))
        return None

    async def _talk(self, client: Client, sock: trio.socket.SocketType) -> None:
        monitor = Monitor(trio.SocketStream(sock), self._dispatcher, self._bus, client)
        self._monitors.add(monitor)
        try:
            await monitor.serve()
        finally:
            self._monitors.discard(monitor)


@contextmanager
def _only_one_starts(path: str) -> Iterator[None]:
    """Two daemons that start at once must not take each other's socket for a stale one."""
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BlockdError(f"Failed to bind socket to {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
