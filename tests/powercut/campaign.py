"""The power goes off under a guest in which blockd runs, at many instants of one run.

``scripts/powercut --backups N --points N --seed S``. A guest boots with a disk whose writes QEMU
records. In it blockd has a raw and a qcow2 image and its state directory on that disk; writers
write, and backups are made to the same disk, until the machine is killed. Then, for many instants,
the disk is made as a power cut at that instant may leave it: what was flushed, and some of what was
not. A daemon of this machine, for which that was another boot, goes on with it, and of promise 3
everything is checked: see ``aftermath.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tests.guest.machine import Guest, Parts
from tests.helpers.tools import require_tool
from tests.powercut.aftermath import look_at, mounted
from tests.powercut.disk_log import Cut, DiskLog, Replay, all_cuts
from tests.powercut.python import interpreter, module_path, python_files
from tests.powercut.story import DISK_BYTES, DISKS, FILE_SYSTEM_BYTES, GUEST_DISK_BYTES

#: Long before this machine's boot: an image that was written to after that is not trusted, for in
#: truth it would have been written to by others.
CLOCK = "2020-01-01"
GUEST_MEMORY_MIB = 512


class Campaign:
    """``figures`` by name; ``broken``: what was not as promised, and where."""

    def __init__(self, directory: Path, cache: Path, seed: int) -> None:
        self._directory = directory
        self._cache = cache
        self._seed = seed
        self._place = directory / "place"
        self._place.mkdir()
        self._disk = directory / "guest.img"
        self._log_path = directory / "writes.log"
        self.figures: Counter[str] = Counter()
        self.broken: list[str] = []

    def run(self, backups: int, points: int | None) -> None:
        """Let so many backups of each disk end before the cut; look at so many instants, or all."""
        self._make_disk()
        # Where nothing can be mounted, that is better found now than after the guest's work.
        with mounted(self._disk, self._place):
            pass
        before = self._directory / "replayed.img"
        subprocess.run(["cp", "--sparse=always", self._disk, before], check=True)
        self._work(backups)
        log = DiskLog(self._log_path)
        try:
            self._cut(log, Replay(log, before), points)
        finally:
            log.close()

    def _make_disk(self) -> None:
        content = self._directory / "content"
        (content / "state").mkdir(parents=True, mode=0o700)
        for disk, driver in DISKS.items():
            for name, form in ((f"{disk}.img", driver), (f"{disk}.backup", "raw")):
                create = [require_tool("qemu-img"), "create", "-q", "-f", form]
                subprocess.run([*create, str(content / name), str(DISK_BYTES)], check=True)
                os.utime(content / name, (0, 0))
        with self._disk.open("wb") as file:
            file.truncate(GUEST_DISK_BYTES)
        make = [require_tool("mke2fs"), "-q", "-t", "ext4", "-b", "4096", "-d", str(content)]
        size = f"{FILE_SYSTEM_BYTES >> 10}k"
        subprocess.run([*make, str(self._disk), size], check=True)
        # Before ``CLOCK``, as the times above: so they stay until what the guest wrote first is on
        # the disk. This one can't be set but from outside.
        for image in content.glob("*.*"):
            change = f"set_inode_field /{image.name} ctime @0"
            debugfs = [require_tool("debugfs"), "-w", "-R", change, str(self._disk)]
            subprocess.run(debugfs, check=True, capture_output=True)

    def _work(self, backups: int) -> None:
        parts = Parts.made_in(self._directory, self._cache, python_files())
        self._log_path.touch()
        disk = {
            "driver": "blklogwrites",
            "file": {"driver": "file", "filename": str(self._disk)},
            "log": {"driver": "file", "filename": str(self._log_path)},
        }
        with Guest(
            *(parts, disk, "cut.sh", self._directory / "console.log"),
            clock=CLOCK,
            memory_mib=GUEST_MEMORY_MIB,
            PLACE=self._place,
            PYTHON=interpreter(),
            PYTHONHOME=sys.base_prefix,
            PYTHONPATH=module_path(),
        ) as guest:
            guest.wait_for("mounted")
            guest.wait_for("ready")
            for number in range(backups):
                guest.wait_for(f"backups {number + 1}")

    def _cut(self, log: DiskLog, replay: Replay, points: int | None) -> None:
        draw = Random(self._seed)
        cuts = all_cuts(log, draw)
        if points is not None:
            cuts = draw.sample(cuts, min(points, len(cuts)))
        last = log.mark_before(len(log.entries))
        self.figures["operations answered"] = sum(sum(each.answered) for each in last.values())
        self.figures["writes recorded"] = len(log.entries)
        self.figures["flushes recorded"] = len(log.flushes)
        for cut in sorted(cuts):
            replay.make(cut, self._disk, draw)
            self._look(cut, log)

    def _look(self, cut: Cut, log: DiskLog) -> None:
        self.figures["points replayed"] += 1
        for found in look_at(self._disk, self._place, self._directory, log.mark_before(cut.end)):
            self.figures += found.figures
            self.broken += [f"{cut}, {text}"[:400] for text in found.broken]


def _print_figures(campaign: Campaign, seconds: float) -> None:
    for name, value in campaign.figures.items():
        print(f"{name:>24}: {value}")
    print(f"{'seconds':>24}: {seconds:.0f}")
    for text in campaign.broken:
        print(text)
    print(f"broken: {len(campaign.broken)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/powercut", description=__doc__)
    parser.add_argument("--backups", type=int, default=10, help="how long the guest works (10)")
    parser.add_argument("--points", type=int, help="at how many instants to cut (all)")
    parser.add_argument("--seed", type=int, default=1, help="which instants, and what is left")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="blockd-powercut-"))
    print(f"all is in {directory}")
    cache = directory / "cache"
    cache.mkdir()
    campaign = Campaign(directory, cache, options.seed)
    try:
        campaign.run(options.backups, options.points)
    finally:
        _print_figures(campaign, time.monotonic() - began)
    return 1 if campaign.broken else 0


if __name__ == "__main__":
    sys.exit(main())
