"""One epoch's marks of an image: in a file, and in memory so that only first marks go there."""

from __future__ import annotations

import mmap

from pyroaring import BitMap64

from blockd.state import marks
from blockd.state.disk import Disk
from blockd.state.records import region_shift

_BYTES = [bytes((value,)) for value in range(256)]


class Epoch:
    """The marks since the epoch began. Granules are ``1 << shift`` bytes."""

    def __init__(self, disk: Disk, file: marks.MarksFile) -> None:
        header = file.header
        self._disk = disk
        self._file = file
        self.number = header.epoch
        self.shift = header.shift
        self.region_shift = region_shift(header.image.size_bytes)
        self.size_bytes = header.image.size_bytes
        #: The same bits as in the file. Anonymous memory, which takes space where it is used.
        self.mirror = mmap.mmap(-1, max(header.mark_bytes, 1))
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
            at = granule >> 3
            byte = self.mirror[at] | 1 << (granule & 7)
            self._disk.write(self._file.fd, _BYTES[byte], self._file.marks_at + at)
            self.mirror[at] = byte
            self.regions.add(offset >> self.region_shift)
        else:
            self._mark_run(offset, length)

    def _mark_run(self, offset: int, length: int) -> None:
        at, mask, size = self._place(offset, length)
        bits = int.from_bytes(self.mirror[at : at + size], "little") | mask
        data = bits.to_bytes(size, "little")
        self._disk.write(self._file.fd, data, self._file.marks_at + at)
        self.mirror[at : at + size] = data
        first = offset >> self.region_shift
        last = (offset + length - 1) >> self.region_shift
        self.regions.add_range(first, last + 1)

    def _place(self, offset: int, length: int) -> tuple[int, int, int]:
        """The first byte of the range's marks, which bits from there on, and in how many bytes."""
        first = offset >> self.shift
        last = (offset + length - 1) >> self.shift
        at = first >> 3
        return at, ((2 << (last - first)) - 1) << (first & 7), (last >> 3) - at + 1

    def end(self) -> None:
        """Let go of file and memory; takes milliseconds where much is marked."""
        self.mirror.close()
        self._disk.close(self._file.fd)
