"""Random input for a real daemon: it must neither fail, nor keep anything, nor stop answering.

``scripts/fuzz TARGET --minutes N`` runs a campaign; the default suite runs short ones with a
fixed seed. A new target is a class in a module of its own, and a line in ``TARGETS``.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from tests.fuzz.nbd_beside_qemu import BesideQemuTarget
from tests.fuzz.nbd_client import NbdClientTarget
from tests.fuzz.nbd_reconnect import NbdReconnectTarget
from tests.fuzz.nbd_server import NbdServerTarget
from tests.fuzz.qcow2 import Qcow2Target
from tests.fuzz.qmp import QmpTarget
from tests.helpers.daemon import Daemon
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient

#: Rounds after which the daemon has everything that it will go on to need.
WARM_UP_ROUNDS = 40
#: Rounds between two looks at what the daemon holds.
LOOK_EVERY_ROUNDS = 40
#: What the allocator keeps without anybody holding it.
MEMORY_SLACK_BYTES = 64 << 20
#: No file of the daemon's may grow beyond this, whatever size it is asked for.
FILE_SIZE_MAX_BYTES = 64 << 20
#: In the log it tells of a mistake in the daemon. A client is told of it, too.
BUG = re.compile("Traceback|Internal error|failed unexpectedly")


class Target(Protocol):
    """What of the daemon gets the input."""

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        """``daemon`` has just been started, in its own directory.

        What else the target needs goes onto the stack, to be given up at the end.
        """

    def play(self, random: Random) -> None:
        """One round. Raise ``AssertionError`` where what is answered is wrong, ``TimeoutError``
        where nothing is.
        """

    def settle(self, qmp: QmpClient) -> None:
        """Take back all that rounds have brought about."""

    def last_input(self) -> str:
        """What was sent lately, for whoever has to find out."""


TARGETS: dict[str, type[Target]] = {
    "nbd-beside-qemu": BesideQemuTarget,
    "nbd-client": NbdClientTarget,
    "nbd-reconnect": NbdReconnectTarget,
    "nbd-server": NbdServerTarget,
    "qcow2": Qcow2Target,
    "qmp": QmpTarget,
}


class Usage(NamedTuple):
    """What a daemon holds."""

    descriptors: int
    tasks: int


@dataclass
class Campaign:
    """Rounds of one target, each made from the seed and its own number."""

    target: type[Target]
    directory: Path
    seed: int
    rounds: int = 0

    def run(self, goes_on: Callable[[int], bool]) -> None:
        """Play while ``goes_on(rounds)``. Raises where the daemon fails."""
        program = [sys.executable, "-m", "tests.fuzz.counted", str(self.directory)]
        self.daemon = Daemon(self.directory, program)
        self.daemon.start()
        resource.prlimit(
            self.daemon.pid, resource.RLIMIT_FSIZE, (FILE_SIZE_MAX_BYTES, resource.RLIM_INFINITY)
        )
        try:
            with ExitStack() as stack:
                self._run(self.target(self.daemon, stack), goes_on)
            assert self.daemon.terminate() == 0
            self._check_log()
        finally:
            if self.daemon.running:
                self.daemon.kill()

    def _run(self, target: Target, goes_on: Callable[[int], bool]) -> None:
        try:
            with QmpClient(self.daemon.qmp_path) as self.qmp:
                self._play(target, WARM_UP_ROUNDS)
                usage, memory = self._usage(), self._memory_bytes()
                while goes_on(self.rounds):
                    self._play(target, LOOK_EVERY_ROUNDS)
                    self._check(usage, memory)
        except BaseException:
            told = f"seed {self.seed}, round {self.rounds}\n{target.last_input()}"
            (self.directory / "last-input.txt").write_text(told)
            raise

    def _play(self, target: Target, rounds: int) -> None:
        for _ in range(rounds):
            self.rounds += 1
            target.play(Random(f"{self.seed}/{self.rounds}"))
        target.settle(self.qmp)

    def _check(self, usage: Usage, memory_bytes: int) -> None:
        """What a client leaves behind takes a moment to go; what never goes has leaked."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._usage()) != usage and time.monotonic() < deadline:
            self.qmp.execute("query-version")
        assert now == usage
        assert self._memory_bytes() < memory_bytes + MEMORY_SLACK_BYTES
        self._check_log()

    def _check_log(self) -> None:
        """Look at what the log has since the last time; then it is emptied, for it is long."""
        log = self.daemon.log()
        found = BUG.search(log)
        assert found is None, log[max(0, found.start() - 2000) : found.start() + 4000]
        os.truncate(self.daemon.log_path, 0)

    def _usage(self) -> Usage:
        descriptors = os.listdir(f"/proc/{self.daemon.pid}/fd")
        return Usage(len(descriptors), int((self.directory / "tasks").read_text()))

    def _memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.daemon.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def main() -> int:
    """Run one campaign; the status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns()
    directory = Path(tempfile.mkdtemp(prefix="blockd-fuzz-"))
    print(f"{options.target}: seed {seed}, in {directory}", flush=True)
    end = time.monotonic() + options.minutes * 60
    campaign = Campaign(TARGETS[options.target], directory, seed)
    with suppress(KeyboardInterrupt):
        campaign.run(lambda _: time.monotonic() < end)
    print(f"{options.target}: {campaign.rounds} rounds, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
