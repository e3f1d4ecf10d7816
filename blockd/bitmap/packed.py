"""Granules as an array of bits, the lowest first, which is how images store them.

A roaring bitmap keeps each 65536 numbers that are dense as such an array too. Those are taken over
as they are, by the portable form of the library ("RoaringFormatSpec"): 16 TiB by 64 KiB with every
tenth granule dirty in 0.1 s, where number by number it takes minutes.
"""

from __future__ import annotations

import re
import struct

from pyroaring import BitMap64

#: Numbers in a container, and the bytes of their bits.
CONTAINER_GRANULES = 1 << 16
CONTAINER_BYTES = CONTAINER_GRANULES // 8
#: With no more numbers than this, the library keeps a list of them.
_LISTED = 4096

#: One 32-bit bitmap of the 64-bit one; its high half, the mark of "no runs", one container with
#: its key, its count less one, and where it lies.
_ONE_ARRAY = struct.Struct("<QIIIHHI")
_NO_RUNS = 12346
_CONTAINER_AT = 16

_NOT_ZERO = re.compile(rb"[^\0]")
_BITS = [tuple(bit for bit in range(8) if byte & (1 << bit)) for byte in range(256)]


def unpack(first: int, data: bytes) -> BitMap64:
    """The granules whose bits are set. ``data`` is one container's bits; ``first`` its number."""
    count = int.from_bytes(data, "little").bit_count()
    if count > _LISTED:
        high, key = first >> 32, (first >> 16) & 0xFFFF
        head = _ONE_ARRAY.pack(1, high, _NO_RUNS, 1, key, count - 1, _CONTAINER_AT)
        granules: BitMap64 = BitMap64.deserialize(head + data)
        return granules
    return BitMap64(
        first + 8 * match.start() + bit
        for match in _NOT_ZERO.finditer(data)
        for bit in _BITS[data[match.start()]]
    )


def pack(first: int, granules: BitMap64) -> bytes:
    """One container's bits: those of ``granules``, all of which lie in it, from ``first`` on."""
    data = granules.serialize()
    # A list of numbers may be as long as the array.
    if len(granules) > _LISTED and len(data) == _ONE_ARRAY.size + CONTAINER_BYTES:
        mark = _ONE_ARRAY.unpack_from(data)[2]
        if mark == _NO_RUNS:
            return data[_ONE_ARRAY.size :]
    shifted = granules.shift(1)
    digits = bytearray(b"0") * CONTAINER_GRANULES
    starts, ends = (granules - shifted).to_array(), (shifted - granules).to_array()
    for start, end in zip(starts, ends, strict=True):
        # An int's digits have the highest one first.
        digits[first + CONTAINER_GRANULES - end : first + CONTAINER_GRANULES - start] = b"1" * (
            end - start
        )
    return int(digits, 2).to_bytes(CONTAINER_BYTES, "little")
