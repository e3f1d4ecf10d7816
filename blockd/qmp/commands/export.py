"""The NBD server and its exports: where QMP and NBD meet."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import trio

from blockd import limits, listener, nbd
from blockd.backup import FilterDriver
from blockd.bitmap import DirtyBitmap
from blockd.block import Filter, Node
from blockd.errors import BlockdError
from blockd.objects import Endpoint, authorize, find_tls
from blockd.qmp.addresses import address_of
from blockd.qmp.commands.bitmap import find_bitmap
from blockd.qmp.services import Services
from blockd.qmp.types.bitmap import BitmapOfNode, BitmapSource
from blockd.qmp.types.export import (
    BlockExportDel,
    FdAddress,
    InetAddress,
    NbdExport,
    NbdServerAdd,
    NbdServerRemove,
    NbdServerStart,
    NbdServerStop,
    QueryBlockExports,
    UnixAddress,
    VsockAddress,
)
from blockd.systemd import passed_socket

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


async def nbd_server_start(services: Services, arguments: NbdServerStart) -> None:
    services.nbd.check_stopped()
    settings = nbd.Settings(
        arguments.max_connections, arguments.handshake_max_seconds, _tls(services, arguments)
    )
    await services.nbd.start(_address(arguments.addr), settings)


def _tls(services: Services, arguments: NbdServerStart) -> nbd.Tls | None:
    creds, authz = arguments.tls_creds, arguments.tls_authz
    if creds is None:
        if authz is not None:
            raise BlockdError(_UNCHECKED)
        return None
    found = find_tls(services.objects, creds, Endpoint.SERVER)
    if authz is not None and found.verify_mode is not ssl.CERT_REQUIRED:
        raise BlockdError(_UNCHECKED)

    def context() -> ssl.SSLContext:
        """As they are now: certificates are renewed while clients are connected."""
        nonlocal found
        with suppress(BlockdError):
            found = find_tls(services.objects, creds, Endpoint.SERVER)
        return found

    async def admit(certificate: nbd.Certificate) -> None:
        if authz is not None:
            await authorize(services.objects, authz, certificate.get("subject", ()))

    return nbd.Tls(context, admit)


#: QEMU takes it, and lets everybody in.
_UNCHECKED = "'tls-authz' needs 'tls-creds' that verify the client's certificate"


def _address(
    declared: InetAddress | UnixAddress | VsockAddress | FdAddress,
) -> listener.Address:
    if isinstance(declared, FdAddress):
        return listener.PassedAddress(passed_socket(declared.data.name))
    return address_of(declared.data)


async def nbd_server_stop(services: Services, _arguments: NbdServerStop) -> None:
    await services.nbd.stop()
    await services.graph.remove_left()


async def block_export_add(services: Services, arguments: NbdExport) -> None:
    """It waits its turn like those that wait for more: none of them is changing the graph now."""
    await trio.lowlevel.checkpoint()
    name = arguments.node_name if arguments.name is None else arguments.name
    if not _ID.fullmatch(arguments.id):
        raise BlockdError("Invalid block export id")
    services.nbd.check_id(arguments.id)
    node = services.graph.get(arguments.node_name)
    if arguments.writable and node.read_only:
        raise BlockdError("Cannot export read-only node as writable")
    services.nbd.check_running()
    for what, text in (("export name", name), ("description", arguments.description)):
        if len(text.encode()) > limits.NBD_STRING_BYTES:
            raise BlockdError(f"{what} '{text}' too long")
    services.nbd.check_name(name)
    bitmaps = [_bitmap(services, arguments, source) for source in arguments.bitmaps or ()]
    services.nbd.add(
        nbd.Export(
            arguments.id,
            node,
            name=name,
            description=arguments.description,
            writable=arguments.writable,
            writethrough=arguments.writethrough,
            graph=services.graph,
            bitmaps=bitmaps,
            allocation_depth=arguments.allocation_depth,
        )
    )


def _bitmap(services: Services, export: NbdExport, source: BitmapSource) -> DirtyBitmap:
    """A bitmap that is to be exported, and may be."""
    if isinstance(source, BitmapOfNode):
        bitmap = find_bitmap(services, source.node, source.name)
    else:
        node = services.graph.get(export.node_name)
        bitmap = _bitmap_below(node, source, writable=export.writable)
    bitmap.check_usable(to_change=False)
    return bitmap


def _bitmap_below(node: Node, name: str, *, writable: bool) -> DirtyBitmap:
    """Of the nearest layer that has one of that name."""
    for layer in _layers(node):
        for bitmap in layer.bitmaps.list():
            if bitmap.name != name:
                continue
            if not writable and not layer.read_only and bitmap.recording:
                # Nobody could tell to which of two reads a change belongs.
                raise BlockdError(f"Enabled bitmap '{name}' incompatible with readonly export")
            return bitmap
    raise BlockdError(f"Bitmap '{name}' is not found")


def _layers(node: Node) -> Iterator[Node]:
    """``node``, and what shows through it: what a filter stands on, and backing files."""
    layer: Node | None = node
    while layer is not None:
        yield layer
        driver = layer.driver
        layer = driver.child if isinstance(driver, Filter | FilterDriver) else layer.backing


async def nbd_server_add(services: Services, arguments: NbdServerAdd) -> None:
    node = services.graph.get(arguments.device, device=arguments.device)
    name = arguments.device if arguments.name is None else arguments.name
    await block_export_add(
        services,
        NbdExport(
            id=name,
            node_name=node.name,
            name=name,
            description=arguments.description,
            # QEMU downgrades here what it refuses in the newer form.
            writable=arguments.writable and not node.read_only,
            bitmaps=[] if arguments.bitmap is None else [arguments.bitmap],
        ),
    )


async def nbd_server_remove(services: Services, arguments: NbdServerRemove) -> None:
    await services.nbd.remove(arguments.name, hard=arguments.mode == "hard")
    await services.graph.remove_left()


async def block_export_del(services: Services, arguments: BlockExportDel) -> None:
    await services.nbd.remove(arguments.id, hard=arguments.mode == "hard")
    await services.graph.remove_left()


def query_block_exports(services: Services, _arguments: QueryBlockExports) -> list[dict[str, Any]]:
    return [
        {
            "node-name": export.node.name,
            "shutting-down": export.shutting_down,
            "type": "nbd",
            "id": export.id,
        }
        for export in services.nbd.exports()
    ]
