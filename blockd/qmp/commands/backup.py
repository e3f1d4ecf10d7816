"""drive-backup and blockdev-backup."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import trio

from blockd.backup import (
    BackupJob,
    BackupRequest,
    BitmapMode,
    OnErrors,
    Sync,
    choose_bitmap,
    plan_backup,
)
from blockd.block import (
    FileDriver,
    Graph,
    Hold,
    Node,
    RawDriver,
    Role,
    create_file,
    guess_format,
    open_file,
)
from blockd.errors import BlockdError
from blockd.job import OnError
from blockd.qmp.services import Services
from blockd.qmp.types.backup import Backup, BlockdevBackup, DriveBackup

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+):")


async def blockdev_backup(services: Services, arguments: BlockdevBackup) -> None:
    graph = services.graph
    source = graph.get(arguments.device, device=arguments.device)
    target = graph.get(arguments.target, device=arguments.target)

    async def release() -> None:
        """The target stays."""

    await _start(services, arguments, source, target, release)


async def drive_backup(services: Services, arguments: DriveBackup) -> None:
    """Whatever can be refused is, before the target is touched: it may be somebody's data."""
    graph = services.graph
    source = graph.get(arguments.device, device=arguments.device)
    choose_bitmap(_request(arguments), source.bitmaps)
    services.jobs.check_id(arguments.job_id)
    driver = await trio.to_thread.run_sync(_open_target, arguments, source.size_bytes)
    target = _add_target(graph, driver)

    async def release() -> None:
        await graph.remove(target)

    await _start(services, arguments, source, target, release)


async def _start(
    services: Services,
    arguments: Backup,
    source: Node,
    target: Node,
    release_target: Callable[[], Awaitable[None]],
) -> None:
    holds: list[Hold] = []

    async def release() -> None:
        for hold in holds:
            hold.release()
        await release_target()

    try:
        plan = plan_backup(_request(arguments), source, target)
        services.jobs.check_id(arguments.job_id)
        holds += _hold(services.graph, source, target, arguments.job_id)
        on_errors = OnErrors(OnError(arguments.on_source_error), OnError(arguments.on_target_error))
        job = BackupJob(
            arguments.job_id,
            plan,
            source,
            target,
            on_errors=on_errors,
            target_path=target.path,
            release=release,
            speed=arguments.speed,
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
        )
    except BaseException:
        with trio.CancelScope(shield=True):
            await release()
        raise
    await services.jobs.start(job)


def _request(arguments: Backup) -> BackupRequest:
    mode = arguments.bitmap_mode
    return BackupRequest(
        Sync(arguments.sync), arguments.bitmap, None if mode is None else BitmapMode(mode)
    )


def _hold(graph: Graph, source: Node, target: Node, job_id: str) -> list[Hold]:
    """No write may reach the source's storage past its node, nor anybody write to the target."""
    user = f"block job '{job_id}'"
    try:
        held = graph.hold(source, user, Role.SOURCE, writes=False, alone=True)
    except BlockdError as error:
        raise BlockdError(f"Could not replace node: {error.message}") from None
    try:
        return [held, graph.hold(target, user, Role.TARGET, writes=True)]
    except BlockdError:
        held.release()
        raise


def _open_target(arguments: DriveBackup, size_bytes: int) -> FileDriver:
    """Open or make the target's file. Blocks. Raises ``BlockdError``."""
    name = arguments.target.removeprefix("file:")
    protocol = _PROTOCOL.match(name)
    if protocol is not None:
        raise BlockdError(f"Unknown protocol '{protocol[1]}'")
    if arguments.mode == "absolute-paths":
        if arguments.format not in (None, "raw", "file"):
            raise BlockdError(f"Unknown file format '{arguments.format}'")
        return create_file(name, size_bytes)
    if arguments.format not in (None, "raw", "file"):
        raise BlockdError(f"Unknown driver '{arguments.format}'")
    if arguments.format is None and (guessed := guess_format(name)) != "raw":
        raise BlockdError(
            f"Image format was not specified for '{name}', which looks like {guessed}: "
            "give format 'raw' if it is to be overwritten"
        )
    return open_file(
        name,
        driver="file",
        read_only=False,
        auto_read_only=False,
        direct=False,
        unmap=True,
        flushes=True,
    )


def _add_target(graph: Graph, driver: FileDriver) -> Node:
    file = graph.add(None, driver, owned=False)
    target = graph.add(None, RawDriver(file), owned=False)
    graph.put_on(target, file, file.users.claim(f"node '{target.name}'", Role.FILE, writes=False))
    return target
