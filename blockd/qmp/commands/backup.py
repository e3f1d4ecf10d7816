"""drive-backup and blockdev-backup: each alone, or with others in a transaction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AsyncExitStack, ExitStack, suppress
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
    plan_backup,
)
from blockd.block import Archive, Node, Role
from blockd.errors import BlockdError
from blockd.job import OnError
from blockd.qmp.commands.action import Action, Change, carry_out
from blockd.qmp.commands.backup_target import Target, TargetFiles, backing_of
from blockd.qmp.services import Services
from blockd.qmp.types.backup import Backup, BackupPerf, BlockdevBackup, DriveBackup


async def blockdev_backup(services: Services, arguments: BlockdevBackup) -> None:
    await carry_out(services, [BackUpToNode(services, arguments)])


async def drive_backup(services: Services, arguments: DriveBackup) -> None:
    await carry_out(services, [BackUpToFile(services, arguments)])


class _BackUp(Action):
    """Make a backup job, which begins with the commit."""

    def __init__(self, services: Services, arguments: Backup) -> None:
        self._services = services
        self._arguments = arguments
        self._source: Node | None = None
        #: What the job holds, and what was made for it; it lets go of both when it closes.
        self._holds = ExitStack()
        self._made = AsyncExitStack()

    @abstractmethod
    def _find_target(self) -> Target:
        """The target, or the ``BlockdError`` with which it is refused."""

    async def stage(self) -> None:
        await trio.lowlevel.checkpoint()
        self._source = self._services.graph.find(self._arguments.device)

    def nodes(self) -> Iterable[Node]:
        return () if self._source is None else (self._source,)

    def take_effect(self) -> Change:
        arguments = self._arguments
        source = self._services.graph.get(arguments.device, device=arguments.device)
        if source is not self._source:
            raise BlockdError(
                f"Node '{source.name}' was made by this transaction: back it up in another one"
            )
        target = self._find_target()
        with ExitStack() as undo:
            undo.callback(self._holds.close)
            self.job = self._make_job(source, target)
            self._services.jobs.admit(self.job)
            undo.callback(self.job.revoke)
            return Change(undo=undo.pop_all().close)

    async def settle(self, *, committed: bool) -> None:
        await trio.lowlevel.checkpoint()
        if committed:
            return
        if self.job is not None:
            await self.job.give_up()
        else:
            await self._release()

    async def _release(self) -> None:
        self._holds.close()
        await self._made.aclose()
        await self._services.graph.remove_left()

    def _make_job(self, source: Node, target: Target) -> BackupJob:
        arguments = self._arguments
        plan = self._plan(source, target.node)
        self._services.jobs.check_id(arguments.job_id)
        self._hold(source, target.node)
        if arguments.filter_node_name is not None:
            self._add_filter(arguments.filter_node_name, source)
        return BackupJob(
            arguments.job_id,
            plan,
            source,
            target.node,
            on_errors=OnErrors(
                OnError(arguments.on_source_error), OnError(arguments.on_target_error)
            ),
            empty_target=target.empty,
            target_path=target.node.path,
            release=self._release,
            record=_Record(self._services.graph.archive, arguments, source, target.node),
            speed=arguments.speed,
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
        )

    def _plan(self, source: Node, target: Node) -> BackupPlan:
        name = self._arguments.filter_node_name
        check = None if name is None else partial(self._services.graph.check_name, name)
        return plan_backup(_request(self._arguments), source, target, check_filter_name=check)

    def _hold(self, source: Node, target: Node) -> None:
        """No write may reach the source's storage past its node, nor others write to the target."""
        graph, user = self._services.graph, f"block job '{self._arguments.job_id}'"
        graph.check_no_other_writer(source)
        # QEMU puts its filter between a node and its users first, where it has any.
        words = "Could not replace node: " if source.users else ""
        try:
            writes = self._arguments.discard_source
            hold = graph.hold(source, user, Role.SOURCE, writes=writes, alone=True)
        except BlockdError as error:
            raise BlockdError(f"{words}{error.message}") from None
        self._holds.callback(hold.release)
        try:
            hold = graph.hold(target, user, Role.TARGET, writes=True)
        except BlockdError as error:
            raise BlockdError(f"Could not create node: {error.message}") from None
        self._holds.callback(hold.release)

    def _add_filter(self, name: str, source: Node) -> None:
        """Put the node that the user named over the source."""
        graph, user = self._services.graph, f"block job '{self._arguments.job_id}'"
        node = graph.add(name, FilterDriver(source), owned=False, hidden=True)
        self._made.push_async_callback(graph.remove, node)
        self._holds.callback(graph.hold(node, user, Role.TARGET, writes=False).release)


class _Record:
    """What the archive has of a backup, from before it copies anything to its end."""

    def __init__(self, archive: Archive, arguments: Backup, source: Node, target: Node) -> None:
        self._archive = archive
        self._arguments = arguments
        self._source = source
        self._target = target

    async def begin(self) -> None:
        arguments = self._arguments
        facts = {
            "node": self._source.name,
            "target": self._target.driver.filename,
            "sync": arguments.sync,
        }
        if arguments.bitmap is not None:
            fact = "bitmap" if self._outlives(arguments.bitmap) else "lost-bitmap"
            facts[fact] = arguments.bitmap
        await self._archive.record_job(arguments.job_id, facts)

    def _outlives(self, bitmap: str) -> bool:
        """Whether the archive has it after a crash. An image that keeps it does not."""
        with suppress(BlockdError):
            self._archive.check_persistent(self._source)
            return self._source.bitmaps.get(bitmap).persistent
        return False

    async def end(self) -> None:
        await self._archive.keep(self._source)
        await self._archive.forget_job(self._arguments.job_id)


class BackUpToNode(_BackUp):
    """blockdev-backup."""

    def __init__(self, services: Services, arguments: BlockdevBackup) -> None:
        super().__init__(services, arguments)
        self._target_name = arguments.target

    def _find_target(self) -> Target:
        return Target(self._services.graph.get(self._target_name, device=self._target_name))


class BackUpToFile(_BackUp):
    """drive-backup. Nothing that is in the target's file is changed before the job runs."""

    def __init__(self, services: Services, arguments: DriveBackup) -> None:
        super().__init__(services, arguments)
        self._options = arguments
        self._target: Target | BlockdError | None = None

    async def stage(self) -> None:
        await super().stage()
        source, options = self._source, self._options
        if source is None:
            return
        if options.sync == "top" and backing_of(source) is None:
            # Without a backing file the topmost image is all there is.
            options = msgspec.structs.replace(options, sync="full")
            self._arguments = options
        files = TargetFiles(self._services.graph, rehearsing=self._services.rehearsing)
        try:
            self._target = await files.open(options, source)
        except BlockdError as error:
            self._target = error
        else:
            self._made.push_async_callback(self._target.release)

    def _find_target(self) -> Target:
        if isinstance(self._target, BlockdError):
            raise self._target
        assert self._target is not None, "the source was there, so the target was opened"
        return self._target


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
