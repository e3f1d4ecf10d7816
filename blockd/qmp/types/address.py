"""What sockets' addresses are made of, of servers and in clients."""

from __future__ import annotations

from msgspec import field

from blockd.qmp.types.base import Object, UInt16


class InetData(Object, kw_only=True):
    """A TCP port by number or name; by default on IPv4 and IPv6, whatever ``host`` has.

    ``to``: where a server's port is taken, the first that is free, up to this one. ``numeric``:
    there are no names to look up. ``keep-alive``: find out when the other machine is gone, which
    is the default. ``mptcp``: Multipath TCP.
    """

    host: str
    port: str
    numeric: bool = False
    to: UInt16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = True
    mptcp: bool = False


class UnixData(Object, kw_only=True):
    """A socket in the file system.

    Or an ``abstract`` one, whose name is in none; not ``tight``, it is filled up with NULs.
    """

    path: str
    abstract: bool = False
    tight: bool = True


class VsockData(Object, kw_only=True):
    """A port of a virtual machine or its host, by numbers. ``cid``: which of them, vsock(7)."""

    cid: str
    port: str


class FdData(Object, kw_only=True):
    """A socket that systemd has opened for the daemon: its name there, or its number."""

    name: str = field(name="str")
