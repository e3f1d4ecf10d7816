"""The NBD server and its exports."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from blockd.qmp.types.address import FdData, InetData, UnixData, VsockData
from blockd.qmp.types.base import Command, Object, Query, UInt32
from blockd.qmp.types.bitmap import BitmapSource


class SocketAddress(Object, kw_only=True):
    """Where a server listens."""


class InetAddress(SocketAddress, tag_field="type", tag="inet", kw_only=True):
    """A TCP address."""

    data: InetData


class UnixAddress(SocketAddress, tag_field="type", tag="unix", kw_only=True):
    """A Unix socket's address."""

    data: UnixData


class VsockAddress(SocketAddress, tag_field="type", tag="vsock", kw_only=True):
    """An address between a virtual machine and its host."""

    data: VsockData


class FdAddress(SocketAddress, tag_field="type", tag="fd", kw_only=True):
    """A socket that the service manager has opened."""

    data: FdData


class NbdServerStart(Command, kw_only=True):
    """Take NBD clients at an address.

    ``max-connections``: at once; 0 for no limit. ``handshake-max-seconds``: a client that has
    not chosen an export by then is dropped; 0 for no limit. ``tls-creds``: the credentials with
    which every client must encrypt. ``tls-authz``: the object that says whose certificates are
    let in; by default, all of the authority's.
    """

    command: ClassVar[str] = "nbd-server-start"

    handshake_max_seconds: UInt32 = 10
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: UInt32 = 100
    addr: InetAddress | UnixAddress | VsockAddress | FdAddress


class NbdServerStop(Command, kw_only=True):
    """Delete all exports, disconnect their clients, and listen no more."""

    command: ClassVar[str] = "nbd-server-stop"


class ExportOptions(Object, kw_only=True):
    """Export a node: the arguments of ``block-export-add``.

    ``id``: what other commands and events call the export. ``writethrough``: every write is on
    stable storage before it is answered.
    """

    id: str
    node_name: str
    writable: bool = False
    writethrough: bool = False


class NbdExport(ExportOptions, tag_field="type", tag="nbd", kw_only=True):
    """An NBD export. ``name``: what clients ask for, by default the node's name.

    ``bitmaps``: clients may ask what is dirty in them, by the meta contexts
    ``qemu:dirty-bitmap:NAME``; those without a node are looked for on the exported one, then on
    those below it. They are in use until the export is deleted. ``allocation-depth``: clients
    may ask which image of a chain holds something, by ``qemu:allocation-depth``.
    """

    name: str | None = None
    description: str = ""
    bitmaps: list[BitmapSource] | None = None
    allocation_depth: bool = False


class BlockExportDel(Command, kw_only=True):
    """Delete an export; ``hard`` disconnects its clients, ``safe`` refuses while it has some."""

    command: ClassVar[str] = "block-export-del"

    id: str
    mode: Literal["safe", "hard"] = "safe"


class NbdServerAdd(Command, kw_only=True):
    """The older form of ``block-export-add``, for the node ``device``.

    ``name`` is the export's name and its id, by default the node's name. ``writable``: as far as
    the node is. ``bitmap``: one that clients may ask for.
    """

    command: ClassVar[str] = "nbd-server-add"

    name: str | None = None
    description: str = ""
    device: str
    writable: bool = False
    bitmap: str | None = None


class NbdServerRemove(Command, kw_only=True):
    """The older form of ``block-export-del``; ``name`` is the export's id."""

    command: ClassVar[str] = "nbd-server-remove"

    name: str
    mode: Literal["safe", "hard"] = "safe"


class BlockExportInfo(Object, kw_only=True):
    """An export. ``shutting-down``: it takes no new clients, and goes when the last one has."""

    id: str
    type: Literal["nbd"]
    node_name: str
    shutting_down: bool


class QueryBlockExports(Query, kw_only=True):
    """All exports, newest first."""

    command: ClassVar[str] = "query-block-exports"
    returns: ClassVar[Any] = list[BlockExportInfo]
