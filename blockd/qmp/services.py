"""What the command handlers work on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import trio

from blockd.block import Graph
from blockd.events import Bus
from blockd.job import Jobs
from blockd.nbd import NbdServer
from blockd.objects import Objects


@dataclass(slots=True)
class Services:
    """The parts of the daemon, as the root has put them together."""

    graph: Graph
    jobs: Jobs
    nbd: NbdServer
    bus: Bus
    #: Closes the exports and ends the jobs; returns when that is done.
    end_service: Callable[[], Awaitable[None]]
    #: Lets the daemon end once the replies that are under way have been sent.
    stop: Callable[[], None]
    #: The daemon is ending: what would change something is refused.
    ending: bool = False
    #: Held by the command that changes something: one at a time, as in QEMU.
    changes: trio.Lock = field(default_factory=trio.Lock)
    #: Held by the command that computes a bitmap's digest.
    digests: trio.Lock = field(default_factory=trio.Lock)
    #: Whatever is done is undone at once, and must not be seen.
    rehearsing: bool = False

    @property
    def objects(self) -> Objects:
        """What commands made for other commands to name."""
        return self.graph.objects

    def rehearsal(self) -> Services:
        """The same parts, to try out what commands would do; nobody hears of their jobs."""
        return replace(self, jobs=self.jobs.rehearsal(), bus=Bus(), rehearsing=True)
