"""A connected socket, for one task that receives and any number that send."""

from __future__ import annotations

import socket
import ssl

import trio

from blockd import limits
from blockd.nbd.tls import Socket, TlsSocket


class Disconnected(ConnectionError):  # noqa: N818 - it may be the ordinary end
    """The server has closed its end."""


class Stream:
    """``sock`` is connected and non-blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Socket = sock
        self._sending = trio.Lock()
        self._buffer = memoryview(bytearray(limits.NBD_CLIENT_BUFFER_BYTES))
        #: The bytes received and not yet taken are ``_buffer[_start:_end]``.
        self._start = self._end = 0

    async def start_tls(self, context: ssl.SSLContext, hostname: str | None) -> None:
        """Go on encrypted. What was received before and not taken is not in clear.

        ``hostname``: what the server's certificate must be for. Raises ``OSError``, and
        ``ValueError`` where that is no name.
        """
        assert isinstance(self._sock, socket.socket)
        early = self._buffer[self._start : self._end]
        self._sock = await TlsSocket.start(
            self._sock, context, server=False, hostname=hostname, early=early
        )
        self._start = self._end = 0

    async def fill(self, count: int) -> memoryview:
        """Wait for ``count`` bytes, at most the buffer's size, and show them without taking them.

        They are valid until the next call. Raises ``OSError``, ``trio.ClosedResourceError``.
        """
        while self._end - self._start < count:
            if self._start:
                held = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(held)] = held
                self._start, self._end = 0, len(held)
            self._end += await self._receive(self._buffer[self._end :])
        return self._buffer[self._start : self._start + count]

    async def take(self, count: int) -> memoryview:
        """As ``fill``, and take them; cancelled, none is taken."""
        view = await self.fill(count)
        self._start += count
        return view

    async def wait_some(self) -> None:
        """Return when there may be something to take; now ``take_some_into`` finds nothing."""
        await trio.lowlevel.wait_readable(self._sock)

    def take_some_into(self, view: memoryview) -> int:
        """Fill the front of ``view`` with what is there; how far. Raises ``OSError``."""
        held = min(self._end - self._start, len(view))
        if held:
            view[:held] = self._buffer[self._start : self._start + held]
            self._start += held
            return held
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            return 0
        if not count:
            raise Disconnected("the server has closed the connection")
        return count

    async def _receive(self, view: memoryview) -> int:
        while True:
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            if not count:
                raise Disconnected("the server has closed the connection")
            return count

    async def send(self, *views: bytes | memoryview) -> None:
        """Send all of it with nobody else's bytes in between.

        Cancelled in the middle, it hangs up, for the server can't be told where it ended.
        """
        async with self._sending:
            try:
                for view in views:
                    await self._send(memoryview(view))
            except trio.Cancelled:
                self.close()
                raise

    async def _send(self, view: memoryview) -> None:
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    def close(self) -> None:
        """Whoever waits for the socket gets ``trio.ClosedResourceError``."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
