"""The same random handshakes and requests for blockd and for qemu-nbd: answers and content.

``scripts/fuzz nbd-beside-qemu`` goes on for longer.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.helpers.daemon import Daemon
from tests.helpers.nbd_beside_qemu import OPTIONS, REQUESTS, side_by_side

HANDSHAKES = 1000
PROGRAMS = 200


def test_options_in_any_order_are_answered_the_same(daemon: Daemon, tmp_path: Path) -> None:
    with side_by_side(tmp_path, daemon) as pair:
        for seed in range(HANDSHAKES):
            pair.haggle(Random(seed))
    assert pair.differed.keys() == OPTIONS.keys()


def test_requests_are_answered_the_same_and_do_the_same(daemon: Daemon, tmp_path: Path) -> None:
    with side_by_side(tmp_path, daemon) as pair:
        for seed in range(PROGRAMS):
            pair.run(Random(seed))
    assert pair.differed.keys() == REQUESTS.keys()
