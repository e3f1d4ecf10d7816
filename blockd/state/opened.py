"""A state directory as it is found."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

from blockd.state.database import open_database
from blockd.state.disk import Disk, HostDisk
from blockd.state.heartbeat import Clock, Heartbeat
from blockd.state.host import Boot, this_boot
from blockd.state.loading import load_images, load_jobs
from blockd.state.lock import DirectoryLock
from blockd.state.own_directory import make_own

_log = logging.getLogger(__name__)


class Opened:
    """What opening a directory gives, before anything goes on in it. Blocks."""

    def __init__(
        self, path: str, disk: Disk, lock: DirectoryLock, clock: Clock = time.time_ns
    ) -> None:
        """``clock``: as of ``Heartbeat``. Raises ``OSError`` and ``BlockdError``."""
        self._lock = lock
        self._disk = disk
        self.database, damaged = open_database(os.path.join(path, "state.db"))
        try:
            if damaged:
                _log.error("the database in '%s' is damaged: a new one is made", path)
            self.images = load_images(self.database.images(), disk)
            self.jobs = load_jobs(self.database)
            titles = (title.row for image in self.images.values() for title in image.bitmaps)
            self.last_row = max([self.database.last_row(), *self.images, *titles])
            self.rows: Iterator[int] = itertools.count(self.last_row + 1)
            self.heartbeat = Heartbeat(disk, clock)
        except BaseException:
            self.database.close()
            raise

    def end(self) -> None:
        """Let go of all of it."""
        self.heartbeat.end()
        self._disk.end()
        self.database.close()
        self._lock.release()


def open_directory(path: str) -> tuple[Opened, Boot, Disk]:
    """Make or open the one at ``path``. Blocks. Raises ``OSError`` and ``BlockdError``."""
    make_own(path)
    with ExitStack() as undo:
        lock = DirectoryLock(path)
        undo.callback(lock.release)
        disk = HostDisk(os.path.join(path, "marks"))
        undo.callback(disk.end)
        boot = this_boot()
        opened = Opened(path, disk, lock)
        undo.pop_all()
        return opened, boot, disk
