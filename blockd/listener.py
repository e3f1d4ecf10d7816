"""Where a server listens, and how it takes its clients."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from blockd import limits
from blockd.errors import BlockdError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system; ``mode``: who may connect, by default what the umask leaves."""

    path: str
    mode: int | None = None

    def __str__(self) -> str:
        return self.path

    def check_length(self) -> None:
        """Raise ``BlockdError`` where no socket can have this path."""
        if len(os.fsencode(self.path)) > _UNIX_PATH_BYTES:
            raise BlockdError(f"UNIX socket path '{self.path}' is too long")


#: A family, and what sockets of it take as an address.
SocketAddress = tuple[socket.AddressFamily, str | tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class InetAddress:
    """A TCP port; ``host`` may be a name, and then stands for each of its addresses."""

    host: str
    port: str
    ipv4: bool | None = None
    ipv6: bool | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @contextmanager
    def resolving(self) -> Iterator[None]:
        """The body looks it up; what goes wrong is raised as ``BlockdError``, in QEMU's words."""
        refused = f"address resolution failed for {self}"
        if self.port.isdecimal() and int(self.port) > _PORT_MAX:
            # The C library, and QEMU with it, would take what is left of it in 16 bits.
            raise BlockdError(f"{refused}: Servname not supported for ai_socktype")
        try:
            yield
        except OSError as error:
            raise BlockdError(f"{refused}: {error.strerror}") from error
        except UnicodeError as error:
            raise BlockdError(f"{refused}: Name or service not known") from error

    def wanted(self, found: Iterable[tuple[Any, ...]]) -> list[SocketAddress]:
        """Those of ``getaddrinfo``'s rows that are of a family wanted. Raises ``BlockdError``."""
        families = {
            socket.AF_INET: self.ipv4 if self.ipv4 is not None else not self.ipv6,
            socket.AF_INET6: self.ipv6 if self.ipv6 is not None else not self.ipv4,
        }
        rows = [(family, address) for family, *_, address in found if families.get(family)]
        if not rows:
            raise BlockdError(
                f"address resolution failed for {self}: no address of the wanted family"
            )
        return rows


Address = UnixAddress | InetAddress


#: The longest path that fits into an address, with its NUL.
_UNIX_PATH_BYTES = 107
_PORT_MAX = 65535


class Listener:
    """Non-blocking sockets that listen at one address."""

    def __init__(self, sockets: Sequence[socket.socket], path: str | None = None) -> None:
        """``path``: where the socket lies in the file system."""
        self.sockets = sockets
        self._path = path
        self._identity = _identity(path)
        self._complained_at = float("-inf")

    async def accept(self, sock: socket.socket) -> socket.socket | None:
        """A client that waits at ``sock``, one of ``sockets``; nothing happens before it is taken.

        None where there is none: somebody else was faster, it has gone, or it can't be had. Then
        it is because descriptors are out, most likely, and it goes on waiting: that is logged now
        and then, and this returns after a pause.
        """
        try:
            client, _ = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            await self._pause(error)
            return None
        client.setblocking(False)
        return client

    async def _pause(self, error: OSError) -> None:
        now = trio.current_time()
        if now >= self._complained_at + limits.ACCEPT_COMPLAINT_SECONDS:
            self._complained_at = now
            _log.warning("new clients can't be accepted, and wait: %s", error)
        await trio.sleep(limits.ACCEPT_PAUSE_SECONDS)

    def close(self) -> None:
        """Stop listening; a socket in the file system is removed if it is still ours."""
        # While it listens nobody else's file can get its inode number.
        if self._path is not None and _identity(self._path) == self._identity:
            with suppress(OSError):
                os.unlink(self._path)
        for sock in self.sockets:
            sock.close()


def listen(address: Address) -> Listener:
    """Listen there; may wait for a name server. Raises ``BlockdError`` with the reason."""
    match address:
        case UnixAddress(path, mode):
            address.check_length()
            return Listener([_listen_unix(path, mode)], path)
        case InetAddress():
            return Listener(_listen_inet(address))


def _identity(path: str | None) -> tuple[int, int] | None:
    if path is None:
        return None
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listen_unix(path: str, mode: int | None) -> socket.socket:
    if not path:
        # The kernel would choose a name that is in no file system.
        raise BlockdError("UNIX socket path is empty")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # What a killed server left behind is in the way of bind; QEMU takes it away too.
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                _refuse_live(path)
                os.unlink(path)
        sock.bind(path)
        if mode is not None:
            # Nobody can connect before `listen`: the mode is right from the first client on.
            os.chmod(path, mode)
        return _listening(sock)
    except OSError as error:
        sock.close()
        raise BlockdError(f"Failed to bind socket to {path}: {error.strerror}") from error


def _refuse_live(path: str) -> None:
    """QEMU takes a live socket away from its server; it may be the one of our own commands."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _listen_inet(address: InetAddress) -> Sequence[socket.socket]:
    sockets: list[socket.socket] = []
    unavailable: OSError | None = None
    try:
        for family, sockaddr in _resolve(address):
            try:
                sockets.append(_listen_at(family, sockaddr))
            except OSError as error:
                # One name may stand for addresses of which the machine has not all.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                unavailable = error
        if not sockets and unavailable is not None:
            raise unavailable
    except OSError as error:
        for sock in sockets:
            sock.close()
        what = "find an available port" if error.errno == errno.EADDRINUSE else "bind socket"
        raise BlockdError(f"Failed to {what}: {error.strerror}") from error
    return sockets


def _listen_at(family: socket.AddressFamily, sockaddr: str | tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own, so that one can be had without the other.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        return _listening(sock)
    except OSError:
        sock.close()
        raise


def _resolve(address: InetAddress) -> list[SocketAddress]:
    """The addresses behind a host name, without repetition. Raises ``BlockdError``."""
    with address.resolving():
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    return list(dict.fromkeys(address.wanted(found)))


def _listening(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    sock.listen(limits.LISTEN_BACKLOG)
    return sock
