"""The NBD server: its listeners, its exports and their clients."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.listener import Address, Listener, listen
from blockd.nbd.activity import Activity
from blockd.nbd.agreement import ExportInfo
from blockd.nbd.channel import Channel, ClientGone
from blockd.nbd.connection import Connection
from blockd.nbd.export import Export
from blockd.nbd.handshake import Handshake
from blockd.nbd.memory import Memory
from blockd.nbd.steps import HardDisconnect, NeedData, Reply, SoftDisconnect, StartTls, Transmission
from blockd.nbd.tls import Certificate
from blockd.nbd.wire import ProtocolError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """How connections are encrypted.

    ``context`` is asked for each of them. ``admit`` raises ``BlockdError`` for who must not come
    in.
    """

    context: Callable[[], ssl.SSLContext]
    admit: Callable[[Certificate], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server treats its clients. ``0`` connections: no limit; ``0`` seconds: no deadline.

    ``tls``: what each client must do; without it, none can.
    """

    max_connections: int = limits.NBD_CONNECTIONS
    handshake_seconds: float = limits.NBD_HANDSHAKE_SECONDS
    tls: Tls | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """What exists while the server listens."""

    settings: Settings
    listener: Listener
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    connections: int = 0


class NbdServer:
    """At most one listening server, and the exports that its clients may open.

    ``nursery`` holds the server's tasks; it outlives them all.
    """

    def __init__(self, nursery: trio.Nursery, bus: Bus) -> None:
        self._nursery = nursery
        self._bus = bus
        self._activity = Activity()
        self._memory = Memory()
        self._running: _Running | None = None
        self._one_start = trio.Lock()
        self._exports: dict[str, Export] = {}
        self._connection_ended = trio.Event()

    # -- listening -----------------------------------------------------------------------------

    async def start(self, address: Address, settings: Settings) -> None:
        """Listen; clients are served from now on. Raises ``BlockdError``."""
        async with self._one_start:
            self.check_stopped()
            listener = await trio.to_thread.run_sync(listen, address)
            self._running = _Running(settings, listener)
            self._nursery.start_soon(self._serve, self._running)

    def check_stopped(self) -> None:
        """Raise ``BlockdError`` where the server listens already."""
        if self._running is not None:
            raise BlockdError("NBD server already running")

    async def stop(self) -> None:
        """Disconnect all clients and delete all exports. Raises ``BlockdError``."""
        running = self._running
        if running is None:
            raise BlockdError("NBD server not running")
        running.scope.cancel()
        await running.ended.wait()

    async def close(self) -> None:
        """As ``stop``, when there is something to stop."""
        if self._running is not None:
            await self.stop()

    # -- exports -------------------------------------------------------------------------------

    def check_id(self, export_id: str) -> None:
        """Raise ``BlockdError`` unless a new export may have this id."""
        if export_id in self._exports:
            raise BlockdError(f"Block export id '{export_id}' is already in use")

    def check_running(self) -> None:
        """Raise ``BlockdError`` unless there is a server for exports to be seen at."""
        if self._running is None:
            raise BlockdError("NBD server not running")

    def check_name(self, name: str) -> None:
        """Raise ``BlockdError`` unless a new export may be called this by clients, now."""
        if self._running is None or self._running.scope.cancel_called:
            raise BlockdError("NBD server not running")
        if self._find(name) is not None:
            raise BlockdError(f"NBD server already has export named '{name}'")

    def add(self, export: Export) -> None:
        """Let clients see ``export``, which ``check_id`` and ``check_name`` have let pass."""
        assert self._running is not None
        export.multi_conn = self._running.settings.max_connections != 1
        self._exports[export.id] = export

    def get(self, export_id: str) -> Export:
        """The export with this id. Raises ``BlockdError``."""
        export = self._exports.get(export_id)
        if export is None or export.shutting_down:
            raise BlockdError(f"Export '{export_id}' is not found")
        return export

    async def remove(self, export_id: str, *, hard: bool) -> None:
        """Delete an export: ``hard`` disconnects its clients, otherwise they are in the way.

        Returns once the export is gone. Raises ``BlockdError``.
        """
        export = self.get(export_id)
        if export.connections and not hard:
            raise BlockdError(f"export '{export_id}' still in use")
        export.shutting_down = True
        for scope in export.connections:
            scope.cancel()
        self._delete_if_left(export)
        await export.deleted.wait()

    def _delete_if_left(self, export: Export) -> None:
        """The last to leave an export that is shutting down deletes it, whoever waits for that."""
        if export.shutting_down and not export.connections:
            self._delete(export)

    def _delete(self, export: Export) -> None:
        del self._exports[export.id]
        export.release()
        export.deleted.set()
        self._bus.publish("BLOCK_EXPORT_DELETED", {"id": export.id})

    def exports(self) -> list[Export]:
        """All exports, newest first."""
        return list(reversed(self._exports.values()))

    # What the handshake asks.

    def find(self, name: str) -> ExportInfo | None:
        export = self._find(name)
        return export.info() if export is not None else None

    def list(self) -> Iterable[ExportInfo]:
        return [export.info() for export in self._exports.values() if not export.shutting_down]

    def _find(self, name: str) -> Export | None:
        for export in self._exports.values():
            if export.name == name and not export.shutting_down:
                return export
        return None

    # -- clients -------------------------------------------------------------------------------

    async def _serve(self, running: _Running) -> None:
        try:
            with running.scope:
                async with trio.open_nursery() as nursery:
                    for sock in running.listener.sockets:
                        nursery.start_soon(self._accept, running, sock, nursery)
        finally:
            running.listener.close()
            for export in self.exports():
                self._delete(export)
            self._running = None
            running.ended.set()

    async def _accept(self, running: _Running, sock: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            most = running.settings.max_connections
            while most and running.connections >= most:
                await self._connection_ended.wait()
            client = await running.listener.accept(sock)
            if client is not None:
                running.connections += 1
                nursery.start_soon(self._serve_client, running, client)

    async def _serve_client(self, running: _Running, client: socket.socket) -> None:
        """The boundary of one connection: whatever goes wrong in it ends it alone."""
        channel = Channel(client, self._activity)
        try:
            if client.family == socket.AF_UNIX:
                # With TCP the kernel finds out by itself what is best.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.NBD_SOCKET_SEND_BYTES)
            elif client.family != socket.AF_VSOCK:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._activity.serving():
                await self._converse(running.settings, channel)
        except* (ClientGone, OSError, trio.TooSlowError) as gone:
            _log.info("NBD: a client was lost: %r", gone.exceptions[0])
        except* ProtocolError as refused:
            _log.warning("NBD: a client was dropped: %r", str(refused.exceptions[0]))
        except* BlockdError as refused:
            _log.warning("NBD: a client was not let in: %s", refused.exceptions[0])
        except* Exception:  # noqa: BLE001 - the boundary
            _log.exception("NBD: a connection failed")
        finally:
            channel.close()
            running.connections -= 1
            self._connection_ended.set()
            self._connection_ended = trio.Event()

    async def _converse(self, settings: Settings, channel: Channel) -> None:
        with trio.fail_after(settings.handshake_seconds or float("inf")):
            chosen = await self._shake_hands(settings, channel)
        if chosen is None:
            return
        export = self._find(chosen.export.name)
        if export is None:
            return
        connection = Connection(
            channel,
            export,
            headers=chosen.headers,
            contexts=chosen.contexts,
            early=chosen.early,
            memory=self._memory,
        )
        with trio.CancelScope() as scope:
            export.connections.add(scope)
            try:
                await channel.send(memoryview(chosen.reply))
                await connection.serve()
            finally:
                export.connections.remove(scope)
                self._delete_if_left(export)

    async def _shake_hands(self, settings: Settings, channel: Channel) -> Transmission | None:
        handshake = Handshake(self, tls=settings.tls is not None)
        received = memoryview(bytearray(limits.NBD_HANDSHAKE_BYTES))
        while True:
            match handshake.step():
                case NeedData():
                    count = await channel.receive_some_into(received)
                    handshake.feed(received[:count])
                case Reply(data):
                    await channel.send(memoryview(data))
                case StartTls(reply, early):
                    assert settings.tls is not None
                    await channel.send(memoryview(reply))
                    certificate = await channel.start_tls(settings.tls.context(), early)
                    await settings.tls.admit(certificate)
                case Transmission() as chosen:
                    return chosen
                case SoftDisconnect(reply):
                    await channel.send(memoryview(reply))
                    return None
                case HardDisconnect(reason):
                    raise ProtocolError(reason)
