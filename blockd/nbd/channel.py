"""A connected socket as the transmission phase needs it: bursts in, bursts out."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Protocol

import trio

from blockd import limits
from blockd.nbd.activity import Activity
from blockd.nbd.tls import Certificate, Socket, TlsSocket
from blockd.nbd.wire import ProtocolError


class ClientGone(Exception):  # noqa: N818 - the ordinary end of a connection
    """The client has closed its end in the middle of something."""


class Idle(Protocol):
    """Who does without memory while it waits for its client."""

    def rest(self) -> None:
        """Do without it from now on."""

    def wake(self) -> memoryview:
        """Have some again."""


class Channel:
    """``sock`` is connected and non-blocking. One task receives; any task may send."""

    def __init__(self, sock: socket.socket, activity: Activity) -> None:
        self._sock: Socket = sock
        self._activity = activity
        self._send_lock = trio.Lock()
        self._spins = limits.NBD_SPINS_MAX
        self._slice_ends = 0.0

    async def start_tls(self, context: ssl.SSLContext, early: bytes) -> Certificate:
        """Go on encrypted; the client's certificate. Raises ``OSError``.

        ``early`` is what was received before and is not in clear.
        """
        assert isinstance(self._sock, socket.socket)
        with self._activity.waiting():
            secure = await TlsSocket.start(self._sock, context, server=True, early=early)
        self._sock = secure
        return secure.certificate

    def close(self) -> None:
        """Hang up. Nobody may be using the channel."""
        self._sock.close()

    # -- receiving -----------------------------------------------------------------------------

    async def receive_some_into(self, view: memoryview) -> int:
        """As ``receive_into``, where an end is not expected: raises ``ClientGone``.

        It never spins: a client in the middle of something large has more of it ready when the
        event loop comes back, and needs the processor for that.
        """
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            count = await self._receive_after_wait(view)
        else:
            await self.end_turn_if_over()
        if not count:
            raise ClientGone
        return count

    async def receive_into(
        self, view: memoryview, *, spin: bool = True, idle: Idle | None = None
    ) -> int:
        """Receive what is there, at least a byte; 0 at the end.

        Where it has to wait, it asks ``idle`` afterwards for memory in the place of ``view``.
        ``spin`` False: it is no use to spin for it before the wait, as requests still run; their
        threads need the interpreter, and the client may be waiting for them.
        Fairness: a client that always has more to say lets the others in once a time slice.
        """
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            wait = self._receive_later if spin else self._receive_after_wait
            return await wait(view, idle)
        if time.monotonic() > self._slice_ends:
            await self.end_turn()
        return count

    async def end_turn(self) -> None:
        """Let the other connections have theirs."""
        await trio.lowlevel.checkpoint()
        self._begin_slice()

    async def end_turn_if_over(self) -> None:
        """As ``end_turn``, once this connection's time slice is over."""
        if time.monotonic() > self._slice_ends:
            await self.end_turn()

    def _begin_slice(self) -> None:
        """Shorter where others wait too: each of them waits for the slices of all."""
        alone = self._activity.alone
        seconds = limits.NBD_SLICE_SECONDS if alone else limits.NBD_SHARED_SLICE_SECONDS
        self._slice_ends = time.monotonic() + seconds

    async def _receive_later(self, view: memoryview, idle: Idle | None) -> int:
        """Spin for the next request, then wait for it.

        A client with one request in flight answers a reply within microseconds; a wait through
        the event loop costs more than that. The count of spins follows their success, and
        grows again when a wait was so short that more of them would have met its end.
        """
        recv_into = self._sock.recv_into
        if self._activity.alone:
            for _ in range(self._spins):
                try:
                    count = recv_into(view)
                except BlockingIOError:
                    continue
                self._spins = min(limits.NBD_SPINS_MAX, self._spins * 2)
                await self.end_turn_if_over()
                return count
            self._spins = max(1, self._spins // 2)
        began = time.monotonic()
        count = await self._receive_after_wait(view, idle)
        if time.monotonic() - began < limits.NBD_SHORT_WAIT_SECONDS:
            self._spins = min(limits.NBD_SPINS_MAX, self._spins * 4)
        return count

    async def _receive_after_wait(self, view: memoryview, idle: Idle | None = None) -> int:
        while True:
            if idle is not None:
                idle.rest()
            with self._activity.waiting():
                await trio.lowlevel.wait_readable(self._sock)
            self._begin_slice()
            if idle is not None:
                view = idle.wake()
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                continue

    # -- sending -------------------------------------------------------------------------------

    async def send_burst(self, view: memoryview) -> None:
        """Send all of ``view``: as ``send``, without its cost where the socket takes all."""
        if not self._send_lock.locked():
            try:
                sent = self._sock.send(view)
            except BlockingIOError:
                sent = 0
            if sent == len(view):
                return
            view = view[sent:]
        # Acquiring is the first thing `send` does, so nobody's reply gets into ours.
        await self.send(view)

    async def send(self, *views: memoryview) -> None:
        """Send all of ``views`` with nobody else's bytes in between.

        Raises ``OSError``, and ``ProtocolError`` where the client has long taken nothing.
        """
        async with self._send_lock:
            for view in views:
                await self._send(view)

    async def _send(self, view: memoryview) -> None:
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                with trio.move_on_after(limits.NBD_UNREAD_SECONDS) as patience:
                    await trio.lowlevel.wait_writable(self._sock)
                if patience.cancelled_caught:
                    raise ProtocolError("it takes none of its replies") from None
            else:
                # A client that takes it as fast as it comes is served in turns too.
                if view:
                    await self.end_turn_if_over()
