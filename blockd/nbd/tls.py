"""TLS over a connected socket, for both ends: as a socket for those who use it.

OpenSSL works in memory, and the socket is read and written in large pieces: a burst of small
records costs one system call.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Any, Protocol, cast

import trio

from blockd import limits

#: What ``ssl.SSLSocket.getpeercert`` returns.
Certificate = dict[str, Any]

#: What came from a socket, until OpenSSL has taken it: at once, so that all connections share it.
_received = memoryview(bytearray(limits.NBD_TLS_RECEIVE_BYTES))


class Socket(Protocol):
    """What the users of a non-blocking socket need of it.

    Where ``send`` has raised ``BlockingIOError``, the same bytes have to be sent again.
    """

    def fileno(self) -> int: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def send(self, data: memoryview, /) -> int: ...
    def close(self) -> None: ...


class TlsSocket:
    """A ``Socket`` above another. Use ``start`` to get one."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, out: ssl.MemoryBIO
    ) -> None:
        self._sock = sock
        self._tls = tls
        self._incoming = incoming
        self._out = out
        #: The other end has said good-bye.
        self._ended = False
        #: Encrypted, and not yet sent.
        self._unsent = memoryview(b"")
        #: How much that was given to ``send`` is encrypted, and ``send`` has yet to say so.
        self._encrypted = 0

    @classmethod
    async def start(
        cls,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server: bool,
        hostname: str | None = None,
        early: bytes | memoryview = b"",
    ) -> TlsSocket:
        """Shake hands. ``early``: what has been received and not been looked at.

        ``hostname``: what the server's certificate must be for. Raises ``OSError``, of which
        ``ssl.SSLError`` is one.
        """
        incoming, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        incoming.write(early)
        tls = context.wrap_bio(incoming, out, server_side=server, server_hostname=hostname)
        made = cls(sock, tls, incoming, out)
        await made._shake_hands()
        return made

    @property
    def certificate(self) -> Certificate:
        """The other end's, where it has been checked; otherwise empty."""
        return self._tls.getpeercert() or {}

    def fileno(self) -> int:
        return self._sock.fileno()

    async def _shake_hands(self) -> None:
        while True:
            try:
                # It computes for milliseconds, in which the loop serves others.
                await trio.to_thread.run_sync(self._tls.do_handshake)
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError:
                # The other end is told why, if it still listens.
                with suppress(OSError):
                    self._flush()
                raise
            else:
                done = True
            await self._flush_all()
            if done:
                return
            await self._fetch_some()

    async def _flush_all(self) -> None:
        while True:
            try:
                self._flush()
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            else:
                return

    async def _fetch_some(self) -> None:
        while True:
            try:
                count = self._fetch()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            if not count:
                raise ConnectionResetError("the connection was closed during the TLS handshake")
            return

    # -- as a socket ---------------------------------------------------------------------------

    def recv_into(self, view: memoryview) -> int:
        """Fill the front of ``view`` with what is there, at least a byte; 0 at the end.

        It fetches once at the most: what TLS says for itself, such as new keys, may never end.
        """
        count = self._decrypt_into(view)
        if not count and not self._ended:
            # Cut off or ended in order: to NBD it makes no difference.
            self._ended = not self._fetch()
            count = self._decrypt_into(view)
            if self._out.pending:
                self._answer()
            if not count and not self._ended:
                raise BlockingIOError
        return count

    def _answer(self) -> None:
        """Send what TLS says for itself: to each wish for new keys, that there are some.

        Who wishes for more and more, and takes no answer, must not fill the memory.
        """
        with suppress(BlockingIOError):
            self._flush()
        # A piece that `send` has encrypted may wait there too.
        if self._out.pending > 2 * limits.NBD_TLS_SEND_BYTES:
            raise ConnectionAbortedError("the other end takes no answer to its wishes for new keys")

    def _decrypt_into(self, view: memoryview) -> int:
        tls, incoming, count = self._tls, self._incoming, 0
        with suppress(ssl.SSLWantReadError):
            while count < len(view) and (incoming.pending or tls.pending()):
                # With a buffer it returns how much it has put there.
                received = cast(int, tls.read(len(view) - count, view[count:]))
                if not received:
                    self._ended = True
                    break
                count += received
        return count

    def _fetch(self) -> int:
        count = self._sock.recv_into(_received)
        self._incoming.write(_received[:count])
        return count

    def send(self, view: memoryview) -> int:
        """Send the front of ``view``; how much of it."""
        if not self._encrypted:
            self._encrypted = self._tls.write(view[: limits.NBD_TLS_SEND_BYTES])
        self._flush()
        sent, self._encrypted = self._encrypted, 0
        return sent

    def _flush(self) -> None:
        while self._unsent or self._out.pending:
            if not self._unsent:
                self._unsent = memoryview(self._out.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def close(self) -> None:
        """Say good-bye if there is room for it, and close the socket."""
        with suppress(OSError):
            # It raises, as the other end has not answered; nobody waits for that.
            self._tls.unwrap()
        with suppress(OSError):
            self._flush()
        self._sock.close()
