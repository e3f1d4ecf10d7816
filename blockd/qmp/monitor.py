"""One QMP client: its commands in order, its replies and the events."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Any

import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.events import Bus, Event
from blockd.qmp import arguments, audit, wire
from blockd.qmp.access import Client, Role
from blockd.qmp.dispatch import Dispatcher, describe
from blockd.qmp.framing import Broken, Reader
from blockd.qmp.outbox import Outbox
from blockd.qmp.session import GREETING, NEGOTIATION, Session, parse_request
from blockd.qmp.types.meta import QmpCapabilities

_log = logging.getLogger(__name__)


class Monitor:
    """Serves the client at ``stream`` until it goes, or does not read what it is sent."""

    def __init__(
        self, stream: trio.SocketStream, dispatcher: Dispatcher, bus: Bus, client: Client
    ) -> None:
        self._client = client
        self._stream = stream
        self._dispatcher = dispatcher
        self._bus = bus
        self._session = Session()
        self._outbox = Outbox(self._drop)
        self._finishing = False

    async def serve(self) -> None:
        """Return when the client has gone; a command that it began is carried out before."""
        self._outbox.put(wire.encode(GREETING))
        unsubscribe = self._bus.subscribe(self._hear)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                # One that sends no more may still read.
                await self.drain()
                nursery.cancel_scope.cancel()
        finally:
            unsubscribe()

    async def drain(self) -> None:
        """Wait until everything so far has been sent, for a moment at most."""
        with trio.move_on_after(limits.QMP_DRAIN_SECONDS):
            await self._outbox.wait_empty()

    async def finish(self) -> None:
        """Take no more commands, and ``drain``."""
        self._finishing = True
        await self.drain()

    def _hear(self, event: Event) -> None:
        if self._session.negotiated:
            self._outbox.put(wire.event(event))

    async def _write(self) -> None:
        try:
            while True:
                data = await self._outbox.next()
                await self._stream.send_all(data)
                self._outbox.sent(len(data))
        except trio.BrokenResourceError:
            self._hang_up()

    def _drop(self) -> None:
        _log.warning(
            "%s was dropped: it left more than %d bytes unread",
            self._client,
            limits.QMP_OUTBOX_BYTES,
        )
        self._hang_up()

    def _hang_up(self) -> None:
        """Let the reader find the connection's end, when it has carried out what it is at."""
        self._outbox.close()
        with suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)

    async def _read(self) -> None:
        reader = Reader()
        while data := await self._stream.receive_some(limits.QMP_RECEIVE_BYTES):
            for message in reader.feed(data):
                # One that reads slowly waits for itself; only events may overtake it.
                await self._outbox.wait_room()
                if self._outbox.closed or self._finishing:
                    return
                await self._handle(message)
                await trio.lowlevel.checkpoint()

    async def _handle(self, message: Any | Broken) -> None:
        request_id: dict[str, Any] = {}
        try:
            if isinstance(message, Broken):
                raise BlockdError(message.message)
            if isinstance(message, dict) and "id" in message:
                request_id["id"] = message["id"]
            reply = wire.success(await self._execute(message), request_id)
        except Exception as error:  # noqa: BLE001 - the boundary of one command
            failure = describe(error)
            reply = wire.failure(failure.error_class, failure.message, request_id)
        self._outbox.put(reply)

    async def _execute(self, message: Any) -> object:
        request = parse_request(message)
        self._session.admit(request.name)
        if request.name == NEGOTIATION:
            wanted: QmpCapabilities = arguments.parse(QmpCapabilities, request.arguments)
            self._session.negotiate(wanted.enable or [])
            return None
        changing = self._dispatcher.changing(request.name)
        if changing is None:
            return await self._dispatcher.execute(request.name, request.arguments)
        with audit.recorded(self._client, changing, request.arguments):
            if self._client.role is not Role.FULL:
                raise BlockdError(
                    f"The command {request.name} is not for clients that may only look"
                )
            return await self._dispatcher.execute(request.name, request.arguments)
