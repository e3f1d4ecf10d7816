"""Meta contexts: what each says of a range of its export.

Source: ``doc/proto.md``, "Metadata querying"; ``docs/interop/nbd.rst`` of QEMU for "qemu:".
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from operator import sub
from typing import Final, Protocol

from blockd import limits
from blockd.bitmap import Pin
from blockd.block import Allocation, Node
from blockd.nbd.chunks import Runs
from blockd.nbd.options import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP
from blockd.nbd.wire import State

#: The numbers that QEMU gives them; those of bitmaps follow.
_BASE_ALLOCATION_ID: Final = 0
_ALLOCATION_DEPTH_ID: Final = 1
_DIRTY_BITMAP_ID: Final = 2
#: The bit of a dirty run.
_DIRTY: Final = 1

#: Lets others have their turn, where it is time for that.
Pause = Callable[[], Awaitable[None]]


class RunList:
    """Consecutive runs, at most ``limit``; neighbours with the same flags become one.

    ``extended``: their lengths may have more than 32 bits. The numbers have the size that they
    are sent in: to convert the most that there may be would stop the loop for some ms.
    """

    def __init__(self, limit: int, *, extended: bool) -> None:
        self._limit = limit
        self._typecode = "Q" if extended else "I"
        self._lengths = array(self._typecode)
        self._flags = array(self._typecode)
        #: Something did not fit any more.
        self.full = False

    def add(self, length: int, flags: int) -> None:
        if not length or self.full:
            return
        if self._flags and self._flags[-1] == flags:
            self._lengths[-1] += length
        elif len(self._flags) == self._limit:
            self.full = True
        else:
            self._lengths.append(length)
            self._flags.append(flags)

    def add_dirty(self, at: int, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Clean bytes from ``at`` on, but for these dirty ranges; at least one, none adjacent.

        In bulk: a range takes a tenth of a microsecond.
        """
        self.add(starts[0] - at, 0)
        self.add(stops[0] - starts[0], _DIRTY)
        count = min(len(starts) - 1, self._limit)
        code = self._typecode
        flags = array(code, (0, _DIRTY)) * count
        pairs = flags[:]
        pairs[::2] = array(code, map(sub, starts[1 : count + 1], stops[:count]))
        pairs[1::2] = array(code, map(sub, stops[1 : count + 1], starts[1 : count + 1]))
        room = self._limit - len(self._lengths)
        self.full = self.full or len(pairs) > room
        self._lengths += pairs[:room]
        self._flags += flags[:room]

    @property
    def runs(self) -> Runs:
        return Runs(self._lengths, self._flags)


class Context(Protocol):
    """One meta context of an export."""

    async def collect(self, runs: RunList, offset: int, length: int, pause: Pause) -> None:
        """Tell ``runs`` of the range from its beginning on, as far as they take it.

        Something of it at least. Raises ``OSError``.
        """


class _OfAllocation:
    """A context that ``describe`` makes from what the export's node knows."""

    def __init__(self, node: Callable[[], Node], describe: Callable[[Allocation], int]) -> None:
        self._node = node
        self._describe = describe

    async def collect(self, runs: RunList, offset: int, length: int, pause: Pause) -> None:
        end = offset + length
        for _ in range(limits.NBD_STATUS_STEPS):
            for run in await self._node().allocation(offset, end - offset):
                runs.add(run.extent.length, self._describe(run))
                offset = run.extent.end
            if offset >= end or runs.full:
                return
            await pause()


def _state(run: Allocation) -> int:
    return (State.HOLE | State.ZERO).value if run.zero else 0


def _depth(run: Allocation) -> int:
    return run.depth


class _OfBitmap:
    """What is dirty in a pinned bitmap."""

    def __init__(self, pin: Pin) -> None:
        self._pin = pin

    async def collect(self, runs: RunList, offset: int, length: int, pause: Pause) -> None:
        end = offset + length
        for starts, stops in self._pin.bits.spans(offset, length):
            # To find them may have taken as long as to add them will.
            await pause()
            runs.add_dirty(offset, starts, stops)
            offset = stops[-1]
            if runs.full:
                return
            await pause()
        runs.add(end - offset, 0)


class Contexts:
    """All meta contexts of an export, by number."""

    def __init__(
        self, node: Callable[[], Node], pins: Sequence[tuple[str, Pin]], *, depth: bool
    ) -> None:
        """``pins``: the bitmaps and their names; ``depth``: whether to tell the depth too."""
        self._contexts: dict[int, Context] = {_BASE_ALLOCATION_ID: _OfAllocation(node, _state)}
        self.names = {_BASE_ALLOCATION_ID: BASE_ALLOCATION}
        if depth:
            self._contexts[_ALLOCATION_DEPTH_ID] = _OfAllocation(node, _depth)
            self.names[_ALLOCATION_DEPTH_ID] = ALLOCATION_DEPTH
        for number, (name, pin) in enumerate(pins, _DIRTY_BITMAP_ID):
            self._contexts[number] = _OfBitmap(pin)
            self.names[number] = DIRTY_BITMAP + name

    async def runs(
        self, number: int, offset: int, length: int, *, one: bool, extended: bool, pause: Pause
    ) -> Runs:
        """What a context says of the range; ``one``: in a single run. Raises ``OSError``."""
        runs = RunList(1 if one else limits.NBD_STATUS_RUNS, extended=extended)
        await self._contexts[number].collect(runs, offset, length, pause)
        return runs.runs
