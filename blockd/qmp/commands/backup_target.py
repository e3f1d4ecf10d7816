"""The file that a drive-backup fills: opened or made for it, and gone with it from the graph."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from blockd.block import (
    Graph,
    NewFile,
    Node,
    RawDriver,
    create_file,
    guess_format,
    is_block_device,
    open_file,
    rehearse_file,
)
from blockd.errors import BlockdError
from blockd.qmp.types.backup import DriveBackup

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+):")


@dataclass(frozen=True, slots=True)
class Target:
    """A backup's target: ``empty`` drops what is there, ``release`` lets go of it."""

    node: Node
    empty: Callable[[], Awaitable[None]] | None = None
    release: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint


async def open_target(
    graph: Graph, arguments: DriveBackup, source: Node, *, rehearsing: bool
) -> Target:
    """Open the target for a backup of ``source``; what is there stays as it is until ``empty``.

    ``rehearsing``: where nothing is there, nothing comes to be. Raises ``BlockdError``.
    """
    make = rehearse_file if rehearsing else create_file
    file = await trio.to_thread.run_sync(_open_file, arguments, source.size_bytes, make)
    target = await _add_node(graph, file, arguments.mode)
    if arguments.sync == "none":
        await target.release()
        raise BlockdError(
            f"Driver '{arguments.format or 'raw'}' of node '{target.node.name}' "
            "does not support backing files"
        )
    return target


def _open_file(
    arguments: DriveBackup, size_bytes: int, make: Callable[[str, int], NewFile]
) -> NewFile:
    """Blocks."""
    name = arguments.target.removeprefix("file:")
    protocol = _PROTOCOL.match(name)
    if protocol is not None:
        raise BlockdError(f"Unknown protocol '{protocol[1]}'")
    if arguments.mode == "absolute-paths":
        if arguments.format not in (None, "raw", "file"):
            raise BlockdError(f"Unknown file format '{arguments.format}'")
        if arguments.sync == "none":
            file_format = arguments.format or "raw"
            raise BlockdError(f"Backing file not supported for file format '{file_format}'")
        return make(name, size_bytes)
    if arguments.format not in (None, "raw", "file"):
        raise BlockdError(f"Unknown driver '{arguments.format}'")
    if arguments.format is None and (guessed := guess_format(name)) != "raw":
        raise BlockdError(
            f"Image format was not specified for '{name}', which looks like {guessed}: "
            "give format 'raw' if it is to be overwritten"
        )
    driver = open_file(
        name,
        driver="host_device" if is_block_device(name) else "file",
        read_only=False,
        auto_read_only=False,
        direct=False,
        unmap=True,
        flushes=True,
    )
    return NewFile(driver, made=None)


async def _add_node(graph: Graph, file: NewFile, mode: str) -> Target:
    driver, used = file.driver, False

    async def empty() -> None:
        nonlocal used
        used = True
        await driver.make_empty()

    async def remove_unused() -> None:
        """A refused command leaves nothing behind."""
        if not used:
            await trio.to_thread.run_sync(file.remove)

    async def release() -> None:
        try:
            await graph.remove(node)
        finally:
            await remove_unused()

    try:
        graph.check_storage(driver)
    except BlockdError:
        with trio.CancelScope(shield=True):
            await driver.close()
            await remove_unused()
        raise
    below = graph.add(None, driver, owned=False, hidden=True)
    node = graph.add(None, RawDriver(below), owned=False, hidden=True)
    return Target(node, empty if mode == "absolute-paths" else None, release)
