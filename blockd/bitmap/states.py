"""What a dirty bitmap can be: a sum type, so that each state has its own bits.

    Recording <-> Stopped         enable, disable
    Recording, Stopped -> Frozen  freeze; back by reclaim or abdicate
    Recording, Stopped -> Pinned  pin; back by release
    Inconsistent                  for good

*Stopped* and *Frozen* differ: a stopped bitmap takes no guest writes but is free to be changed by
commands; a frozen one is in use and refuses them, while its successor takes the guest writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockd.bitmap.bits import Bits


@dataclass(frozen=True, slots=True)
class Recording:
    """Guest writes are marked in ``bits``."""

    bits: Bits


@dataclass(frozen=True, slots=True)
class Stopped:
    """Disabled: guest writes leave no mark."""

    bits: Bits


@dataclass(frozen=True, slots=True)
class Frozen:
    """In use by ``job``; nobody changes ``snapshot``. The successor will be or join the bitmap.

    Guest writes are marked in ``successor`` where ``recording``. ``successor_rank`` is its place
    in the node's listing, which the bitmap takes when the successor does.
    """

    snapshot: Bits
    successor: Bits
    recording: bool
    job: str
    successor_rank: int


@dataclass(frozen=True, slots=True)
class Pinned:
    """In use by ``holder``, which only reads ``bits``; guest writes go on being marked."""

    bits: Bits
    recording: bool
    holder: str


@dataclass(frozen=True, slots=True)
class Inconsistent:
    """Nobody knows what changed: it was in use when its image was last left.

    It can only be removed. ``bits`` are empty, and have its granularity and the node's size.
    """

    bits: Bits


State = Recording | Stopped | Frozen | Pinned | Inconsistent


def idle(bits: Bits, *, recording: bool) -> Recording | Stopped:
    """The state of a bitmap with ``bits`` that nobody uses."""
    return Recording(bits) if recording else Stopped(bits)
