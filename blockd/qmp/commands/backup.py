"""drive-backup and blockdev-backup."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from blockd.backup import (
    BackupJob,
    BackupPlan,
    BackupRequest,
    BitmapMode,
    FilterDriver,
    OnErrors,
    Performance,
    Sync,
    choose_bitmap,
    plan_backup,
)
from blockd.block import (
    Graph,
    Hold,
    NewFile,
    Node,
    RawDriver,
    Role,
    create_file,
    guess_format,
    is_block_device,
    open_file,
)
from blockd.errors import BlockdError
from blockd.job import OnError, check_speed
from blockd.qmp.services import Services
from blockd.qmp.types.backup import Backup, BackupPerf, BlockdevBackup, DriveBackup

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+):")


@dataclass(frozen=True, slots=True)
class _Target:
    """A backup's target: ``empty`` drops what is there, ``release`` lets go of it."""

    node: Node
    empty: Callable[[], Awaitable[None]] | None = None
    release: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint


async def blockdev_backup(services: Services, arguments: BlockdevBackup) -> None:
    graph = services.graph
    source = graph.get(arguments.device, device=arguments.device)
    target = graph.get(arguments.target, device=arguments.target)
    await _start(services, arguments, source, _Target(target))


async def drive_backup(services: Services, arguments: DriveBackup) -> None:
    """Whatever can be refused is, before the target is touched: it may be somebody's data."""
    graph = services.graph
    source = graph.get(arguments.device, device=arguments.device)
    if arguments.sync == "top":
        # Without a backing file the topmost image is all there is.
        arguments = msgspec.structs.replace(arguments, sync="full")
    if arguments.sync != "none":
        choose_bitmap(_request(arguments), source.bitmaps)
        services.jobs.check_id(arguments.job_id)
        check_speed(arguments.speed)
    file = await trio.to_thread.run_sync(_open_target, arguments, source.size_bytes)
    target = await _add_target(graph, file, arguments.mode)
    if arguments.sync == "none":
        await target.release()
        raise BlockdError(
            f"Driver '{arguments.format or 'raw'}' of node '{target.node.name}' "
            "does not support backing files"
        )
    await _start(services, arguments, source, target)


async def _start(services: Services, arguments: Backup, source: Node, target: _Target) -> None:
    graph = services.graph
    undo = AsyncExitStack()
    undo.push_async_callback(target.release)
    try:
        plan = _plan(graph, arguments, source, target.node)
        services.jobs.check_id(arguments.job_id)
        for hold in _hold(graph, arguments, source, target.node):
            undo.callback(hold.release)
        if arguments.filter_node_name is not None:
            undo.push_async_callback(_add_filter(graph, arguments, source))
        on_errors = OnErrors(OnError(arguments.on_source_error), OnError(arguments.on_target_error))
        job = BackupJob(
            arguments.job_id,
            plan,
            source,
            target.node,
            on_errors=on_errors,
            empty_target=target.empty,
            target_path=target.node.path,
            release=undo.aclose,
            speed=arguments.speed,
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
        )
    except BaseException:
        with trio.CancelScope(shield=True):
            await undo.aclose()
        raise
    await services.jobs.start(job)


def _plan(graph: Graph, arguments: Backup, source: Node, target: Node) -> BackupPlan:
    name = arguments.filter_node_name
    check = None if name is None else partial(graph.check_name, name)
    return plan_backup(_request(arguments), source, target, check_filter_name=check)


def _request(arguments: Backup) -> BackupRequest:
    mode, perf = arguments.bitmap_mode, arguments.x_perf or BackupPerf()
    return BackupRequest(
        Sync(arguments.sync),
        arguments.bitmap,
        None if mode is None else BitmapMode(mode),
        compress=arguments.compress,
        discard_source=arguments.discard_source,
        performance=Performance(perf.max_workers, perf.max_chunk, perf.min_cluster_size),
    )


def _add_filter(graph: Graph, arguments: Backup, source: Node) -> Callable[[], Awaitable[None]]:
    """Put the node that the user named over the source; returns what takes it out again."""
    node = graph.add(arguments.filter_node_name, FilterDriver(source), owned=False, hidden=True)
    user = f"block job '{arguments.job_id}'"
    hold = graph.hold(node, user, Role.TARGET, writes=False)

    async def remove() -> None:
        hold.release()
        await graph.remove(node)

    return remove


def _hold(graph: Graph, arguments: Backup, source: Node, target: Node) -> list[Hold]:
    """No write may reach the source's storage past its node, nor anybody write to the target."""
    user = f"block job '{arguments.job_id}'"
    graph.check_no_other_writer(source)
    # QEMU puts its filter between a node and its users first, where it has any.
    words = "Could not replace node: " if source.users else ""
    try:
        writes = arguments.discard_source
        held = graph.hold(source, user, Role.SOURCE, writes=writes, alone=True)
    except BlockdError as error:
        raise BlockdError(f"{words}{error.message}") from None
    try:
        return [held, graph.hold(target, user, Role.TARGET, writes=True)]
    except BlockdError as error:
        held.release()
        raise BlockdError(f"Could not create node: {error.message}") from None


def _open_target(arguments: DriveBackup, size_bytes: int) -> NewFile:
    """Open or make the target's file, without changing what is there. Blocks."""
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
        return create_file(name, size_bytes)
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


async def _add_target(graph: Graph, file: NewFile, mode: str) -> _Target:
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
    return _Target(node, empty if mode == "absolute-paths" else None, release)
