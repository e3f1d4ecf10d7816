"""Many lives of one daemon with a state directory, nearly all of which end by SIGKILL.

``scripts/torture --seconds N --kills N --seed S`` runs a campaign; the default suite runs a short
one. Guests in processes of their own write all the while; what they logged says what must be dirty
after each kill, and what the disk holds is compared with its backup.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from random import Random

from tests.helpers.daemon import Daemon
from tests.torture.disk import Disk
from tests.torture.life import Gone, Life

#: Names and formats.
DISKS = {"a": "raw", "b": "qcow2"}


class Death(Enum):
    """Where a life ends: the instant is a matter of luck, within these."""

    START = "while it starts"
    SETUP = "while its nodes are added and its bitmaps checked"
    REPAIR = "while backups are brought up to date"
    WORK = "while commands are given"
    COMMAND = "right after a command was sent"
    REPLY = "right after a command was answered"
    BACKUP = "right after a backup began"
    COMPLETED = "right after a backup was completed"
    ENDING = "while it ends in order"
    NONE = "in order"


class Campaign:
    """Figures by name: ``figures``."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._random = Random(seed)
        state = directory / "state"
        state.mkdir(mode=0o700)
        self._daemon = Daemon(directory, options=["--state-dir", str(state)])
        self._disks = [
            Disk(directory, name, driver, seed * len(DISKS) + number)
            for number, (name, driver) in enumerate(DISKS.items())
        ]
        self._pause = threading.Event()
        self.figures: Counter[str] = Counter()

    def run(self, goes_on: Callable[[Counter[str]], bool]) -> None:
        """Live and die while ``goes_on(figures)``. Raises where a promise is broken."""
        try:
            self._live(Death.NONE, first=True)
            while goes_on(self.figures):
                self._live(self._random.choice(list(Death)))
            self._live(Death.NONE)
        finally:
            self._written = sum(disk.log.count() for disk in self._disks)
            if self._daemon.running:
                self._daemon.kill()
            for disk in self._disks:
                disk.close()
        self.figures["writes"] = self._written

    def _live(self, death: Death, *, first: bool = False) -> None:
        if death is Death.START:
            self._daemon.spawn()
            self._pause.wait(self._random.uniform(0, 0.8))
            self._daemon.kill()
        else:
            self._daemon.start()
            try:
                self._go_through(death, first=first)
            except Gone:
                status = self._daemon.wait()
                assert status in {0, -9}, self._daemon.log()
            for disk in self._disks:
                disk.write_no_more()
        assert "Traceback" not in self._daemon.log(), self._daemon.log()
        self.figures[f"ended {death.value}"] += 1
        self.figures["kills"] += death is not Death.NONE

    def _go_through(self, death: Death, *, first: bool) -> None:
        life = Life(self._daemon, self._disks, self._random, self.figures)
        try:
            if death is Death.SETUP:
                life.kill_after(self._random.uniform(0, 0.4))
            life.open()
            if first:
                life.first_bitmaps()
            life.check()
            if death is Death.REPAIR:
                life.kill_after(self._random.uniform(0, 0.2))
            if death is Death.REPAIR or self._random.random() < 0.5:
                life.repair()
            life.let_write()
            self._work(life, death)
        finally:
            life.close()

    def _work(self, life: Life, death: Death) -> None:
        """Give commands until the daemon is gone."""
        draw = self._random
        if death is Death.WORK:
            life.kill_after(draw.uniform(0, 2))
        for _ in range(draw.randrange(12)):
            life.act()
            life.wait(draw.choice((0, 0, 0.01, 0.1)))
        if death in {Death.NONE, Death.ENDING}:
            if death is Death.ENDING:
                life.kill_after(draw.uniform(0, 0.3))
            life.end()
        if death is Death.COMMAND:
            life.kill_after(draw.uniform(0, 0.01))
        elif death is Death.REPLY:
            life.act()
            life.kill_after(0)
        elif death in {Death.BACKUP, Death.COMPLETED}:
            self._back_up(life, death)
        while True:
            life.act()

    def _back_up(self, life: Life, death: Death) -> None:
        disk = self._random.choice(self._disks)
        life.begin_backup(disk)
        if death is Death.BACKUP:
            life.kill_after(self._random.uniform(0, 0.2))
        life.finish_backup(disk)
        life.kill_after(0)


def _print_figures(figures: Counter[str], seconds: float) -> None:
    for name, value in figures.items():
        print(f"{name:>60}: {value}")
    print(f"{'seconds':>60}: {seconds:.0f}")
    print("lost: 0")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for how long (60)")
    parser.add_argument("--kills", type=int, default=1 << 60, help="at most so many kills")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def goes_on(figures: Counter[str]) -> bool:
        enough = figures["kills"] >= int(options.kills)
        return not enough and time.monotonic() - began < float(options.seconds)

    directory = Path(tempfile.mkdtemp(prefix="blockd-torture-"))
    campaign = Campaign(directory, options.seed)
    try:
        campaign.run(goes_on)
    except BaseException:
        print(f"seed {options.seed}, all is in {directory}", file=sys.stderr)
        _print_figures(campaign.figures, time.monotonic() - began)
        raise
    _print_figures(campaign.figures, time.monotonic() - began)
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
