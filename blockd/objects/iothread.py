"""QEMU's threads for I/O, which blockd has no use for."""

from __future__ import annotations

from dataclasses import dataclass

from blockd.objects.registry import UserObject


@dataclass(slots=True, eq=False)
class Iothread(UserObject):
    """A name only: blockd finds the number of its threads by itself."""
