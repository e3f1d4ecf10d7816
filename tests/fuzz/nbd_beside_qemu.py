"""NBD: what a client sends, right and wrong, to blockd and to qemu-nbd."""

from __future__ import annotations

from contextlib import ExitStack
from random import Random

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_beside_qemu import serve_disk, side_by_side
from tests.helpers.qmp_client import QmpClient


class BesideQemuTarget:
    """Each round is a handshake and some requests, which qemu-nbd gets too: both do the same."""

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        self._pair = stack.enter_context(side_by_side(daemon.directory, daemon))
        self._round = ""

    def last_input(self) -> str:
        return self._round

    def play(self, random: Random) -> None:
        seed = random.getrandbits(64)
        self._round = f"Pair.haggle and Pair.run with Random({seed})"
        self._pair.haggle(Random(seed))
        self._pair.run(Random(seed))

    def settle(self, qmp: QmpClient) -> None:
        """Whoever still seems to be connected would be counted."""
        serve_disk(qmp, self._pair.ours)
