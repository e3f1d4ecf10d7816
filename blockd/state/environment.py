"""What all images of a state directory share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from blockd.bitmap import DirtyBitmap
from blockd.block import Node
from blockd.state.bounded import Bounded
from blockd.state.commits import Commits
from blockd.state.disk import Disk
from blockd.state.heartbeat import Heartbeat


class Listener(Protocol):
    """Who hears what administrators should know. No call waits, or raises."""

    def bitmap_recovered(self, node: Node, bitmap: DirtyBitmap) -> None:
        """A bitmap came back other than it should be: see its ``reason``."""

    def storing_failed(self, node: Node, reason: str) -> None:
        """After a crash from now on, the node's persistent bitmaps would come back all dirty."""

    def storing_resumed(self, node: Node) -> None:
        """What ``storing_failed`` said is over."""


@dataclass(frozen=True, slots=True)
class Environment:
    """``rows`` gives numbers that no row of the database has."""

    disk: Disk
    commits: Commits
    bounded: Bounded
    rows: Iterator[int]
    boot_id: str
    listener: Listener
    heartbeat: Heartbeat
