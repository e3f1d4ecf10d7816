"""Tables as bytes of the file and as numbers in memory. All numbers in a file are big-endian."""

from __future__ import annotations

import sys
from array import array

#: The array types that hold refcounts of 8 << n bits.
_TYPECODES = "BHIQ"


def decode_words(data: bytes | bytearray | memoryview) -> array[int]:
    """64-bit words from a file."""
    words = array("Q")
    words.frombytes(data)
    return _swapped(words)


def encode_words(words: array[int]) -> bytes:
    return _swapped(words[:]).tobytes()


class RefcountCodec:
    """Refcounts of ``1 << order`` bits. Those of less than a byte are held in a byte each."""

    def __init__(self, order: int) -> None:
        self._bits = 1 << order
        self._typecode = _TYPECODES[max(order - 3, 0)]
        #: The largest refcount.
        self.most = (1 << self._bits) - 1

    def decode(self, data: bytes | bytearray | memoryview) -> array[int]:
        counts = array(self._typecode)
        counts.frombytes(_spread(bytes(data), self._bits) if self._bits < 8 else data)
        return _swapped(counts)

    def encode(self, counts: array[int]) -> bytes:
        if self._bits < 8:
            return _gather(counts.tobytes(), self._bits)
        return _swapped(counts[:]).tobytes()

    def zeroes(self, count: int) -> array[int]:
        return array(self._typecode, bytes(count * array(self._typecode).itemsize))

    def of(self, counts: array[int]) -> array[int]:
        """The same counts, none of which is above ``most``."""
        return array(self._typecode, counts)

    def ones(self, count: int) -> array[int]:
        return array(self._typecode, [1]) * count


def _swapped(words: array[int]) -> array[int]:
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _spread(data: bytes, bits: int) -> bytes:
    """A byte for each ``bits`` of ``data``; the least significant of a byte come first.

    All bytes are shifted and masked in one go, as one large number.
    """
    per_byte = 8 // bits
    spread = bytearray(len(data) * per_byte)
    number = int.from_bytes(data, "little")
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * len(data), "little")
    for place in range(per_byte):
        column = (number >> (place * bits)) & mask
        spread[place::per_byte] = column.to_bytes(len(data), "little")
    return bytes(spread)


def _gather(counts: bytes, bits: int) -> bytes:
    """What ``_spread`` undoes."""
    per_byte = 8 // bits
    number = 0
    for place in range(per_byte):
        number |= int.from_bytes(counts[place::per_byte], "little") << (place * bits)
    return number.to_bytes(len(counts) // per_byte, "little")


def find_zero(counts: array[int], start: int) -> int:
    """The first index from ``start`` on with a count of 0, or -1."""
    if start < len(counts) and not counts[start]:
        # Mostly, and the rest copies all of them.
        return start
    size = counts.itemsize
    data = counts.tobytes()
    at = data.find(bytes(size), start * size)
    while at % size and at >= 0:
        at = data.find(bytes(size), at + 1)
    return -1 if at < 0 else at // size


def zero_run(counts: array[int], start: int, most: int) -> int:
    """How many counts from ``start`` on are 0, at most ``most``."""
    size = counts.itemsize
    data = counts[start : start + most].tobytes()
    return (len(data) - len(data.lstrip(b"\0"))) // size


def used_end(counts: array[int]) -> int:
    """The index after the last count that is not 0."""
    return -(-len(counts.tobytes().rstrip(b"\0")) // counts.itemsize)
