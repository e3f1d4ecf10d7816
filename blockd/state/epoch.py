"""One epoch's marks of an image: in a file, and in memory so that only first marks go there."""

from __future__ import annotations

import mmap

from pyroaring import BitMap64

from blockd.state import marks
from blockd.state.disk import Disk
from blockd.state.marks import UNIT_BYTES, UNIT_MARKS_BYTES, seal_unit
from blockd.state.records import region_shift


class Epoch:
    """The marks since the epoch began. Granules are ``1 << shift`` bytes."""

    def __init__(self, disk: Disk, file: marks.MarksFile) -> None:
        header = file.header
        self._disk = disk
        self._fd = file.fd
        self._units_at, self._untouched_at = file.units_at, file.untouched_at
        self.number = header.epoch
        self.shift = header.shift
        self.region_shift = region_shift(header.image.size_bytes)
        self.size_bytes = header.image.size_bytes
        #: The same bits as in the file. Anonymous memory, which takes space where it is used.
        self.mirror = mmap.mmap(-1, max(file.units * UNIT_MARKS_BYTES, 1))
        #: The units without any mark, as the file has them.
        self._untouched = bytearray(file.untouched)
        #: The regions with any mark.
        self.regions = BitMap64()

    def marked(self, offset: int, length: int) -> bool:
        """Whether all granules of the range are marked."""
        at, mask, size = self._place(offset, length)
        return int.from_bytes(self.mirror[at : at + size], "little") & mask == mask

    def mark(self, offset: int, length: int) -> None:
        """Mark all granules of the range. Raises ``OSError``, having marked nothing in memory."""
        granule = offset >> self.shift
        if granule == (offset + length - 1) >> self.shift:
            self._mark_one(granule)
            self.regions.add(offset >> self.region_shift)
        else:
            self._mark_run(offset, length)

    def _mark_one(self, granule: int) -> None:
        mirror, at = self.mirror, granule >> 3
        unit = at // UNIT_MARKS_BYTES
        start = unit * UNIT_MARKS_BYTES
        before = mirror[at]
        mirror[at] = before | 1 << (granule & 7)
        try:
            self._write(unit, mirror[start : start + UNIT_MARKS_BYTES])
        except OSError:
            mirror[at] = before
            raise

    def _mark_run(self, offset: int, length: int) -> None:
        at, mask, size = self._place(offset, length)
        first = at // UNIT_MARKS_BYTES
        start = first * UNIT_MARKS_BYTES
        stop = -(-(at + size) // UNIT_MARKS_BYTES) * UNIT_MARKS_BYTES
        data = bytearray(self.mirror[start:stop])
        within = at - start
        bits = int.from_bytes(data[within : within + size], "little") | mask
        data[within : within + size] = bits.to_bytes(size, "little")
        self._write(first, bytes(data))
        self.mirror[start:stop] = data
        first = offset >> self.region_shift
        last = (offset + length - 1) >> self.region_shift
        self.regions.add_range(first, last + 1)

    def _write(self, first: int, data: bytes) -> None:
        """Write whole units, and then that they have marks: else it is they that are missed."""
        if len(data) == UNIT_MARKS_BYTES:
            sealed = seal_unit(data)
        else:
            starts = range(0, len(data), UNIT_MARKS_BYTES)
            sealed = b"".join(seal_unit(data[at : at + UNIT_MARKS_BYTES]) for at in starts)
        self._disk.write(self._fd, sealed, self._units_at + first * UNIT_BYTES)
        for unit in range(first, first + len(sealed) // UNIT_BYTES):
            if self._untouched[unit >> 3] & 1 << (unit & 7):
                self._touch(unit)

    def _touch(self, unit: int) -> None:
        at = unit >> 3
        byte = self._untouched[at] & ~(1 << (unit & 7))
        self._disk.write(self._fd, bytes((byte,)), self._untouched_at + at)
        self._untouched[at] = byte

    def _place(self, offset: int, length: int) -> tuple[int, int, int]:
        """The first byte of the range's marks, which bits from there on, and in how many bytes."""
        first = offset >> self.shift
        last = (offset + length - 1) >> self.shift
        at = first >> 3
        return at, ((2 << (last - first)) - 1) << (first & 7), (last >> 3) - at + 1

    def end(self) -> None:
        """Let go of file and memory; takes milliseconds where much is marked."""
        self.mirror.close()
        self._disk.close(self._fd)
