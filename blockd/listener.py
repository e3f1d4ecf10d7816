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


#: A family, a protocol or 0, and what such sockets take as an address.
SocketAddress = tuple[socket.AddressFamily, int, Any]


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system; ``mode``: who may connect, by default what the umask leaves.

    ``abstract``: its name is in no file system, unix(7); not ``tight``, it is filled up with NULs.
    """

    path: str
    mode: int | None = None
    abstract: bool = False
    tight: bool = True

    def __str__(self) -> str:
        return self.path

    @property
    def options(self) -> dict[str, Any]:
        """As commands take it."""
        abstract = {"abstract": True} | ({} if self.tight else {"tight": False})
        return {"type": "unix", "path": self.path} | (abstract if self.abstract else {})

    def at(self) -> SocketAddress:
        """Raise ``BlockdError`` where no socket can have this path."""
        path = os.fsencode(self.path)
        if len(path) > _UNIX_PATH_BYTES:
            raise BlockdError(f"UNIX socket path '{self.path}' is too long")
        if self.abstract:
            path = b"\0" + (path if self.tight else path.ljust(_UNIX_PATH_BYTES, b"\0"))
        return socket.AF_UNIX, 0, path


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A port between a virtual machine and its host, vsock(7); numbers, as text."""

    cid: str
    port: str

    def __str__(self) -> str:
        return f"{self.cid}:{self.port}"

    @property
    def options(self) -> dict[str, Any]:
        """As commands take it."""
        return {"type": "vsock", "cid": self.cid, "port": self.port}

    def at(self) -> SocketAddress:
        """Raise ``BlockdError`` where these are no numbers."""
        for what, text in (("cid", self.cid), ("port", self.port)):
            if not (text.isascii() and text.isdecimal()) or int(text) > _VSOCK_MAX:
                raise BlockdError(f"Failed to parse {what} '{text}'")
        return socket.AF_VSOCK, 0, (int(self.cid), int(self.port))


@dataclass(frozen=True, slots=True)
class InetAddress:
    """A TCP port; ``host`` may be a name, and then stands for each of its addresses.

    ``to``: where others have the port, the first one free up to this. ``numeric``: no names.
    ``keep_alive``: whether the other end is asked now and then whether it is still there.
    ``mptcp``: Multipath TCP.
    """

    host: str
    port: str
    ipv4: bool | None = None
    ipv6: bool | None = None
    to: int | None = None
    numeric: bool = False
    keep_alive: bool = True
    mptcp: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def options(self) -> dict[str, Any]:
        """As commands take it."""
        flags = {"ipv4": self.ipv4, "ipv6": self.ipv6, "numeric": self.numeric or None}
        flags |= {"keep-alive": self.keep_alive and None, "mptcp": self.mptcp or None}
        given = {name: value for name, value in flags.items() if value is not None}
        return {"type": "inet", "host": self.host, "port": self.port, **given}

    @property
    def hints(self) -> int:
        """Flags for ``getaddrinfo``."""
        return socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if self.numeric else 0

    @contextmanager
    def resolving(self) -> Iterator[None]:
        """The body looks it up; what goes wrong is raised as ``BlockdError``, in QEMU's words."""
        if self.ipv4 is False and self.ipv6 is False:
            raise BlockdError("Cannot disable IPv4 and IPv6 at same time")
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
        protocol = _IPPROTO_MPTCP if self.mptcp else 0
        rows = [(family, protocol, at) for family, *_, at in found if families.get(family)]
        if not rows:
            raise BlockdError(
                f"address resolution failed for {self}: no address of the wanted family"
            )
        return rows


@dataclass(frozen=True, slots=True)
class PassedAddress:
    """A socket that listens already, and stays when the server stops."""

    fd: int


#: Where a server listens, and where one is found.
Address = UnixAddress | InetAddress | VsockAddress | PassedAddress
RemoteAddress = UnixAddress | InetAddress | VsockAddress


#: The longest path that fits into an address, with its NUL.
_UNIX_PATH_BYTES = 107
_PORT_MAX = 65535
_VSOCK_MAX = (1 << 32) - 1
#: Linux's number, which Python does not name.
_IPPROTO_MPTCP = 262


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
        case UnixAddress(path, mode, abstract=False):
            address.at()
            return Listener([_listen_unix(path, mode)], path)
        case UnixAddress() | VsockAddress():
            return Listener([_listen_alone(address)])
        case InetAddress():
            return Listener(_listen_inet(address))
        case PassedAddress(fd):
            return Listener([_passed(fd)])


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


def _passed(fd: int) -> socket.socket:
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError as error:
        raise BlockdError(f"Descriptor {fd} is no socket: {error.strerror}") from error
    try:
        if not borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BlockdError(f"Descriptor {fd} is no socket that listens")
        sock = borrowed.dup()
    finally:
        borrowed.detach()
    sock.setblocking(False)
    return sock


def _listen_alone(address: UnixAddress | VsockAddress) -> socket.socket:
    where = address.at()
    try:
        return _listen_at(where)
    except OSError as error:
        to = f" to {address}" if isinstance(address, UnixAddress) else ""
        raise BlockdError(f"Failed to bind socket{to}: {error.strerror}") from error


def _listen_inet(address: InetAddress) -> Sequence[socket.socket]:
    """At the first port of those that nobody has yet."""
    found = _resolve(address)
    first: int = found[0][2][1]
    ports = range(first, max(first, address.to or first) + 1)
    for port in ports:
        try:
            return _listen_at_port(found, port, keeps_alive=address.keep_alive)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port != ports[-1]:
                continue
            what = "find an available port" if error.errno == errno.EADDRINUSE else "bind socket"
            raise BlockdError(f"Failed to {what}: {error.strerror}") from error
    raise AssertionError("there is a last port")


def _listen_at_port(
    found: Iterable[SocketAddress], port: int, *, keeps_alive: bool
) -> Sequence[socket.socket]:
    sockets: list[socket.socket] = []
    unavailable: OSError | None = None
    try:
        for family, protocol, (host, _, *rest) in found:
            try:
                sockets.append(_listen_at((family, protocol, (host, port, *rest))))
            except OSError as error:
                # One name may stand for addresses of which the machine has not all.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                unavailable = error
        if not sockets and unavailable is not None:
            raise unavailable
        for sock in sockets if keeps_alive else ():
            # Those of the clients are made like it.
            keep_alive(sock)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_at(where: SocketAddress) -> socket.socket:
    family, protocol, sockaddr = where
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, protocol)
    try:
        if family in (socket.AF_INET, socket.AF_INET6):
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
            address.host or None,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE | address.hints,
        )
    return list(dict.fromkeys(address.wanted(found)))


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel find out when the other end's machine is gone. Raises ``OSError``."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, limits.KEEP_ALIVE_IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, limits.KEEP_ALIVE_INTERVAL_SECONDS),
        (socket.TCP_KEEPCNT, limits.KEEP_ALIVE_QUESTIONS),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _listening(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    sock.listen(limits.LISTEN_BACKLOG)
    return sock
