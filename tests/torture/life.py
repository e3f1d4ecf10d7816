"""One life of the daemon: what it is told to do, and what is then known of its bitmaps."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from pyroaring import BitMap

from tests.helpers.daemon import Daemon
from tests.helpers.qmp_client import QmpClient, QmpError
from tests.torture.disk import DISK_BYTES, MAIN, Disk
from tests.torture.model import BitmapModel, Content, Model, Moment, judge, touched

KIB = 1 << 10
GRANULARITIES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
BITMAPS_MAX = 6
SECTOR_BYTES = 512
#: The share of backups whose target has a bad sector; few of these ever meet it.
BAD_TARGETS = 0.5
#: After the last write that there will ever be.
NEVER = 1 << 62


class Gone(Exception):  # noqa: N818 - what happened to it
    """The daemon has been killed, or has ended."""


class Life:
    """A daemon that has just been started, and these disks, of which it knows nothing yet."""

    def __init__(
        self, daemon: Daemon, disks: Sequence[Disk], random: Random, figures: Counter[str]
    ) -> None:
        self._daemon = daemon
        self._disks = disks
        self._random = random
        self._figures = figures
        self._socket = daemon.directory / "nbd.sock"
        self._pause = threading.Event()
        try:
            self._qmp = QmpClient(daemon.qmp_path)
        except (EOFError, ConnectionError) as error:
            raise Gone from error

    def close(self) -> None:
        self._qmp.close()

    # -- the daemon --------------------------------------------------------------------------

    def kill_after(self, seconds: float) -> None:
        """Kill the daemon then, whatever it is doing. It is not waited for."""
        process = os.pidfd_open(self._daemon.pid)

        def kill() -> None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Raises ``QmpError``, or ``Gone``."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            answer = self._qmp.execute(command, arguments)
        except (EOFError, ConnectionError) as error:
            raise Gone from error
        finally:
            self._hear()
        return answer

    def wait(self, seconds: float) -> None:
        self._pause.wait(seconds)

    def end(self) -> None:
        """Ask the daemon to end, and wait until it has, in order or killed meanwhile."""
        os.kill(self._daemon.pid, signal.SIGTERM)
        try:
            while True:
                self._qmp.events.append(self._qmp.next_event())
                self._hear()
        except (EOFError, ConnectionError) as error:
            raise Gone from error

    def _hear(self) -> None:
        while self._qmp.events:
            event = self._qmp.events.popleft()
            if event["event"] in {"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"}:
                self._end_job(event["event"], event["data"])

    def _end_job(self, name: str, data: dict[str, Any]) -> None:
        (disk,) = (disk for disk in self._disks if disk.name == data["device"])
        bitmap = disk.bitmaps[MAIN]
        assert bitmap.job is not None
        if name == "BLOCK_JOB_COMPLETED" and "error" not in data:
            end = disk.log.count()
            bitmap.model = bitmap.job(bitmap.model, Moment(end, end))
            self._figures["backups"] += 1
        else:
            self._figures["failed backups"] += 1
        bitmap.job = None
        disk.target_open = True

    # -- after the start ---------------------------------------------------------------------

    def open(self) -> None:
        """Add the nodes; their bitmaps are to be back without another command."""
        assert self.execute("query-block-jobs") == []
        for disk in self._disks:
            self.execute("blockdev-add", **disk.options())
            disk.target_open = False
        address = {"type": "unix", "data": {"path": str(self._socket)}}
        self.execute("nbd-server-start", addr=address)

    def first_bitmaps(self) -> None:
        """In the first life of all."""
        for disk in self._disks:
            self.add(disk, MAIN, 64 * KIB, disabled=False)

    def check(self) -> None:
        """Hold every bitmap against what it has to be. No guest is writing."""
        infos = {row["node-name"]: row for row in self.execute("query-named-block-nodes")}
        for disk in self._disks:
            found = {info["name"]: info for info in infos[disk.name].get("dirty-bitmaps", [])}
            self._check_names(disk, found)
            self._export(disk, "-check", writable=True, bitmaps=list(found))
            moment = Moment(disk.before(), disk.log.count())
            dirty = {name: self._read(disk, name) for name in found}
            with self._content(disk) as content:
                for name, info in found.items():
                    bitmap = disk.bitmaps[name]
                    self._check_bitmap(disk, bitmap, info, dirty[name], moment, content)
            self._unexport(disk)
            disk.base = moment.after
            for name, info in found.items():
                disk.begin_anew(disk.bitmaps[name], info["recording"], dirty[name])
        self._figures["checks"] += 1

    def _check_names(self, disk: Disk, found: dict[str, Any]) -> None:
        assert found.keys() <= disk.bitmaps.keys(), f"unknown bitmaps: {sorted(found)}"
        for name in disk.bitmaps.keys() - found.keys():
            bitmap = disk.bitmaps.pop(name)
            assert bitmap.may_be_gone, f"{disk.name} has lost its bitmap '{name}'"
        for name, info in found.items():
            assert info["persistent"], info
            assert not info["busy"], info
            assert not info.get("inconsistent"), info
            assert "reason" not in info, info
            assert info["granularity"] == disk.bitmaps[name].granularity, info

    def _check_bitmap(
        self,
        disk: Disk,
        bitmap: BitmapModel,
        info: dict[str, Any],
        dirty: BitMap,
        moment: Moment,
        content: Content,
    ) -> None:
        recording = info["recording"]
        models = [model for model in bitmap.possible(moment) if model.recording == recording]
        assert models, f"{disk.name} '{bitmap.name}': recording must not be {recording}"
        verdict = judge(bitmap, models, dirty, disk.log, content)
        what = f"{disk.name} '{bitmap.name}'"
        assert not verdict.lost, f"{what}: blocks {list(verdict.lost)[:20]} are not dirty"
        if bitmap.name == MAIN:
            missing = disk.differing_from_backup(content) - dirty
            assert not missing, f"{what}: blocks {list(missing)[:20]} differ from the backup"
        self._figures["bitmaps checked"] += 1
        self._figures["dirty granules"] += verdict.dirty_granules
        self._figures["overshoot granules"] += verdict.overshoot_granules
        self._figures["bitmaps with overshoot"] += verdict.overshoot_granules > 0
        self._figures["reclaimed bitmaps"] += bitmap.job is not None

    def _read(self, disk: Disk, bitmap: str) -> BitMap:
        try:
            return disk.dirty_blocks(self._socket, bitmap)
        except subprocess.CalledProcessError as error:
            self._gone_or(error)
            raise

    def _gone_or(self, error: Exception) -> None:
        """A client of the daemon failed: that is right only if the daemon is gone."""
        try:
            self.execute("query-version")
        except Gone:
            raise Gone from error

    @contextmanager
    def _content(self, disk: Disk) -> Iterator[Content]:
        try:
            with disk.content(self._socket) as content:
                yield content
        except subprocess.CalledProcessError as error:
            self._gone_or(error)
            raise

    def _export(self, disk: Disk, suffix: str = "", **options: Any) -> None:
        name = disk.name + suffix
        export = {"type": "nbd", "id": name, "name": name, "node-name": disk.name}
        self.execute("block-export-add", **export, **options)

    def _unexport(self, disk: Disk) -> None:
        self.execute("block-export-del", id=f"{disk.name}-check", mode="hard")

    def repair(self) -> None:
        """Bring every backup up to date, and compare; no guest is writing."""
        for disk in self._disks:
            self.begin_backup(disk, may_fail=False)
            self.finish_backup(disk)
            self._export(disk, "-check")
            with self._content(disk) as content:
                missing = disk.differing_from_backup(content)
            self._unexport(disk)
            assert not missing, f"{disk.name}: the backup is wrong at {list(missing)[:20]}"
            assert not Path(f"{disk.target}.blockd-incomplete").exists(), disk.name
            self._figures["repairs"] += 1

    def let_write(self) -> None:
        for disk in self._disks:
            self._export(disk, writable=True)
            disk.write_on(self._socket)

    # -- commands ----------------------------------------------------------------------------

    def act(self) -> None:
        """One command that may change something, on one of the disks."""
        disk = self._random.choice(self._disks)
        actions = (self._add, self._remove, self._clear, self._enable, self._disable, self._merge)
        choices = (*actions, self.begin_backup, self._cancel)
        try:
            self._random.choice(choices)(disk)
        except QmpError:
            # Such as for a bitmap that a backup has.
            self._figures["refused commands"] += 1
        self._figures["commands"] += 1

    def add(self, disk: Disk, name: str, granularity: int, *, disabled: bool) -> None:
        model = Model(not disabled, must_from=NEVER, may_from=disk.before())
        bitmap = BitmapModel(name, granularity, model, may_be_gone=True)
        disk.bitmaps[name] = bitmap
        arguments = {"node": disk.name, "name": name, "granularity": granularity}
        self.execute("block-dirty-bitmap-add", **arguments, persistent=True, disabled=disabled)
        bitmap.model = Model(
            not disabled, must_from=disk.log.count(), may_from=bitmap.model.may_from
        )
        bitmap.may_be_gone = False

    def _add(self, disk: Disk) -> None:
        name = f"b{self._random.randrange(BITMAPS_MAX)}"
        if name not in disk.bitmaps:
            granularity = self._random.choice(GRANULARITIES)
            self.add(disk, name, granularity, disabled=self._random.random() < 0.2)

    def _remove(self, disk: Disk) -> None:
        bitmap = self._pick(disk)
        if bitmap.name != MAIN and self._random.random() < 0.5:
            bitmap.may_be_gone = True
            self.execute("block-dirty-bitmap-remove", node=disk.name, name=bitmap.name)
            del disk.bitmaps[bitmap.name]

    def _clear(self, disk: Disk) -> None:
        bitmap = self._pick(disk)
        if bitmap.name != MAIN:
            self._change("block-dirty-bitmap-clear", disk, bitmap, Model.cleared)

    def _enable(self, disk: Disk) -> None:
        self._change("block-dirty-bitmap-enable", disk, self._pick(disk), Model.enabled)

    def _disable(self, disk: Disk) -> None:
        bitmap = self._pick(disk)
        if bitmap.name != MAIN:
            self._change(
                "block-dirty-bitmap-disable",
                disk,
                bitmap,
                lambda model, at: model.disabled(at, disk.log),
            )

    def _merge(self, disk: Disk) -> None:
        target = self._pick(disk)
        sources = [source for source in disk.bitmaps.values() if source is not target][:2]
        if target.name == MAIN or not sources:
            return
        before = disk.before()
        must, may = BitMap(), BitMap()
        for source in sources:
            models = source.possible(Moment(before, before))
            must |= source.expanded(
                BitMap.intersection(*(model.must_at(disk.log, before) for model in models))
            )
            may |= source.expanded(
                BitMap.union(*(model.may_at(disk.log, before) for model in models))
            )

        def merged(model: Model, at: Moment) -> Model:
            late = touched(disk.log, before, at.after)
            for source in sources:
                late |= source.expanded(late)
            return model.merged(must, may | late)

        names = [source.name for source in sources]
        self._change("block-dirty-bitmap-merge", disk, target, merged, bitmaps=names)

    def _change(
        self,
        command: str,
        disk: Disk,
        bitmap: BitmapModel,
        change: Callable[[Model, Moment], Model],
        **arguments: Any,
    ) -> None:
        before = disk.before()
        member = "target" if "merge" in command else "name"
        bitmap.command = lambda model, at: change(model, Moment(before, at.after))
        try:
            self.execute(command, node=disk.name, **{member: bitmap.name}, **arguments)
        except QmpError:
            bitmap.command = None
            raise
        bitmap.model = change(bitmap.model, Moment(before, disk.log.count()))
        bitmap.command = None

    def _pick(self, disk: Disk) -> BitmapModel:
        return self._random.choice(list(disk.bitmaps.values()))

    # -- backups -----------------------------------------------------------------------------

    def begin_backup(self, disk: Disk, *, may_fail: bool = True) -> None:
        """Begin an incremental one, where none runs; some targets have a sector that fails."""
        bitmap = disk.bitmaps[MAIN]
        if bitmap.job is not None:
            return
        if disk.target_open:
            self.execute("blockdev-del", node_name=f"{disk.name}-target")
            disk.target_open = False
        bad_sector = None
        if may_fail and self._random.random() < BAD_TARGETS:
            bad_sector = self._random.randrange(DISK_BYTES // SECTOR_BYTES)
        self.execute("blockdev-add", **disk.target_options(bad_sector))
        self._start_job(disk, bitmap)

    def _start_job(self, disk: Disk, bitmap: BitmapModel) -> None:
        before = disk.before()
        bitmap.job = lambda model, at: model.cleared(Moment(before, at.after))
        target = f"{disk.name}-target"
        backup = {"job-id": disk.name, "device": disk.name, "target": target}
        try:
            self.execute("blockdev-backup", **backup, sync="incremental", bitmap=MAIN)
        except QmpError:
            bitmap.job = None
            disk.target_open = True
            raise
        after = disk.log.count()
        if bitmap.job is not None:
            bitmap.job = lambda model, _: model.cleared(Moment(before, after))

    def finish_backup(self, disk: Disk) -> None:
        """Wait until the backup has ended."""
        try:
            while disk.bitmaps[MAIN].job is not None:
                self._qmp.events.append(self._qmp.next_event())
                self._hear()
        except (EOFError, ConnectionError) as error:
            raise Gone from error

    def _cancel(self, disk: Disk) -> None:
        if disk.bitmaps[MAIN].job is not None:
            self.execute("block-job-cancel", device=disk.name)
