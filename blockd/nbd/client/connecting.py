"""From a server's address and an export's name to a connection in transmission."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.listener import (
    InetAddress,
    RemoteAddress,
    SocketAddress,
    UnixAddress,
    VsockAddress,
    keep_alive,
)
from blockd.nbd.client.connection import Connection
from blockd.nbd.client.handshake import Export, negotiate
from blockd.nbd.client.stream import Stream
from blockd.nbd.client.tls import Tls, tls_reason
from blockd.nbd.wire import ProtocolError


@dataclass(frozen=True, slots=True)
class Target:
    """An export of a server.

    ``dirty_bitmap``: a meta context that is asked for in place of ``base:allocation``.
    """

    address: RemoteAddress
    export: str = ""
    #: TLS credentials, also by the id that they have.
    tls: ssl.SSLContext | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    dirty_bitmap: str | None = None

    @property
    def secure(self) -> Tls | None:
        """How connections are encrypted."""
        if self.tls is None:
            return None
        host = self.address.host if isinstance(self.address, InetAddress) else None
        return Tls(self.tls, self.tls_hostname or host)

    @property
    def options(self) -> dict[str, Any]:
        """As ``blockdev-add`` takes them."""
        others = {
            "export": self.export or None,
            "tls-creds": self.tls_creds,
            "tls-hostname": self.tls_hostname,
            "x-dirty-bitmap": self.dirty_bitmap,
        }
        given = {"server": self.address.options}
        return given | {name: each for name, each in others.items() if each}

    @property
    def uri(self) -> str:
        """The NBD URI (doc/uri.md of the NBD project)."""
        name = quote(self.export, safe="")
        if isinstance(self.address, UnixAddress):
            path = f"/{name}" if name else ""
            return f"nbd+unix://{path}?socket={self.address.path}"
        if isinstance(self.address, VsockAddress):
            return f"nbd+vsock://{self.address}" + (f"/{name}" if name else "")
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"nbd://{host}:{self.address.port}" + (f"/{name}" if name else "")


async def connect(target: Target) -> Connection:
    """Connect and haggle. Raises ``BlockdError`` with the reason."""
    if len(target.export.encode()) > limits.NBD_STRING_BYTES:
        raise BlockdError("export name too long to send to server")
    if len((target.dirty_bitmap or "").encode()) > limits.NBD_STRING_BYTES:
        raise BlockdError("x-dirty-bitmap query too long to send to server")
    try:
        with trio.fail_after(limits.NBD_CLIENT_CONNECT_SECONDS):
            stream = Stream(await _connect_socket(target.address))
            try:
                return Connection(stream, await _negotiate(stream, target))
            except BaseException:
                stream.close()
                raise
    except trio.TooSlowError:
        raise BlockdError(f"Failed to connect to '{target.address}': no answer") from None
    except (ProtocolError, struct.error) as error:
        raise BlockdError(f"{target.address} is no usable NBD server: {error}") from error
    except OSError as error:
        raise BlockdError(f"Failed to read data: {tls_reason(error)}") from error


async def _negotiate(stream: Stream, target: Target) -> Export:
    wanted = target.dirty_bitmap
    if wanted is None:
        return await negotiate(stream, target.export, target.secure)
    export = await negotiate(stream, target.export, target.secure, context=wanted)
    if export.context_id is None:
        raise BlockdError(f"requested x-dirty-bitmap {wanted} not found")
    return export


async def _connect_socket(address: RemoteAddress) -> socket.socket:
    """To the first of the server's addresses that answers. Raises ``BlockdError``."""
    failure = None
    for where in await _resolve(address):
        try:
            return await _connect_at(where, address)
        except OSError as error:
            failure = error
    assert failure is not None
    # trio puts words of its own before the system's.
    reason = os.strerror(failure.errno) if failure.errno else str(failure)
    raise BlockdError(f"Failed to connect to '{address}': {reason}") from failure


async def _connect_at(where: SocketAddress, address: RemoteAddress) -> socket.socket:
    family, protocol, sockaddr = where
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        if isinstance(address, InetAddress):
            # Small requests are not kept back.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.keep_alive:
                keep_alive(sock)
        sock.setblocking(False)
        await trio.socket.from_stdlib_socket(sock).connect(sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


async def _resolve(address: RemoteAddress) -> list[SocketAddress]:
    if not isinstance(address, InetAddress):
        return [address.at()]
    with address.resolving():
        found = await trio.socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=address.hints
        )
    return address.wanted(found)
