"""A file that tells whoever comes after us until when we lived, and how our images were then.

Slots of 64 bytes, each of which ends with a CRC-32 of the rest of what is used of it: the first
has the time, the others one image each. They are rewritten every second, in the page cache, which
outlives a kill; and every few seconds the file is made durable, for after a power cut.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress

from blockd.state.disk import Disk
from blockd.state.records import Sighting

_NAME = "heartbeat"
_SLOT_BYTES = 64
#: An image's row, which is 0 in the first slot; three times, each in seconds and nanoseconds.
_SLOT = struct.Struct("<QqIqIqI")
_SUM = struct.Struct("<I")
_CHUNK_BYTES = 1024 * _SLOT_BYTES
_NS = 10**9
Clock = Callable[[], int]


class Heartbeat:
    """``last_ns``: when a daemon before this one was last alive; 0 where that is not known.

    ``sightings``: how it saw images then, by row.
    """

    def __init__(self, disk: Disk, clock: Clock = time.time_ns) -> None:
        """``clock``: the wall clock, in nanoseconds. Raises ``OSError``."""
        self._disk = disk
        self.clock = clock
        #: Nothing is noted before ``begin``: it would be all that is known of that daemon.
        self._begun = False
        try:
            self._fd = disk.open(_NAME)
        except OSError:
            self._fd = disk.create(_NAME, _SLOT_BYTES)
        self.sightings: dict[int, Sighting] = {}
        self._slots: dict[int, int] = {}
        with suppress(OSError):
            self._read()
        first = self.sightings.pop(0, None)
        self.last_ns = 0 if first is None else first.seen_ns
        self._free: list[int] = []
        self._end = max(self._slots.values(), default=0) + 1

    def _read(self) -> None:
        at = 0
        while data := self._disk.read(self._fd, _CHUNK_BYTES, at):
            for start in range(0, len(data), _SLOT_BYTES):
                self._read_slot((at + start) // _SLOT_BYTES, data[start : start + _SLOT_BYTES])
            at += len(data)

    def _read_slot(self, number: int, slot: bytes) -> None:
        body = slot[: _SLOT.size]
        if slot[_SLOT.size :][: _SUM.size] == _SUM.pack(zlib.crc32(body)) and any(body):
            row, *times = _SLOT.unpack(body)
            seen, changed, inode_changed = (
                seconds * _NS + rest for seconds, rest in zip(times[::2], times[1::2], strict=True)
            )
            self.sightings[row], self._slots[row] = Sighting(seen, changed, inode_changed), number

    def begin(self, rows: Collection[int]) -> None:
        """What is known of an earlier daemon is recorded. ``rows``: of the images there are."""
        if not self._begun:
            self._begun = True
            self._slots = {row: slot for row, slot in self._slots.items() if row in rows}
            taken = set(self._slots.values())
            self._free = [slot for slot in range(1, self._end) if slot not in taken]
        self.beat()

    def beat(self) -> None:
        """Note that the daemon is alive. A microsecond; what goes wrong errs to "dead"."""
        if self._begun:
            with suppress(OSError):
                self.note(self.clock())

    def note(self, time_ns: int) -> None:
        """Raises ``OSError``."""
        self._write(0, 0, Sighting(time_ns, 0, 0))

    def saw(self, row: int, sighting: Sighting) -> None:
        """Note how an image was; where that goes wrong, how it was before stays noted."""
        if self._begun:
            slot = self._slots.get(row)
            if slot is None:
                slot = self._slots[row] = self._free.pop() if self._free else self._end
                self._end = max(self._end, slot + 1)
            with suppress(OSError):
                self._write(slot, row, sighting)

    def _write(self, slot: int, row: int, sighting: Sighting) -> None:
        times = (sighting.seen_ns, sighting.changed_ns, sighting.inode_changed_ns)
        body = _SLOT.pack(row, *(part for each in times for part in divmod(each, _NS)))
        self._disk.write(self._fd, body + _SUM.pack(zlib.crc32(body)), slot * _SLOT_BYTES)

    def sync(self) -> None:
        """Make it durable as it is. Blocks. Raises ``OSError``."""
        self._disk.sync(self._fd)

    def end(self) -> None:
        """Let go of the file."""
        self._disk.close(self._fd)
