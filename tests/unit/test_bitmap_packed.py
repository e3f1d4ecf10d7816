"""Bits as bytes and back, whatever form the library keeps them in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.bitmap import Bits

GRANULE = 512
HIGH = (3 << 32) + (9 << 16)


def marked(granules: list[int], count: int) -> Bits:
    bits = Bits(count * GRANULE, GRANULE)
    bits.update_granules(granules)
    return bits


def model(granules: list[int], first: int, count: int) -> bytes:
    packed = bytearray(count // 8)
    for each in granules:
        if first <= each < first + count:
            packed[(each - first) // 8] |= 1 << (each - first) % 8
    return bytes(packed)


SPARSE = [0, 7, 8, 65535, 65536, 131071, 200000]
DENSE = random.Random(1).sample(range(70000), 30000)
RUNS = [*range(100, 60000), *range(65000, 66000)]


@pytest.mark.parametrize("granules", [[], SPARSE, DENSE, RUNS], ids=["", "sparse", "dense", "runs"])
@pytest.mark.parametrize(("first", "count"), [(0, 200008), (8, 16), (65528, 16), (64, 131072)])
@pytest.mark.parametrize("base", [0, HIGH])
def test_same_as_a_number(granules: list[int], first: int, count: int, base: int) -> None:
    bits = marked([base + each for each in granules], base + 300000)
    packed = bits.packed(base + first, count)
    assert packed == model(granules, first, count)
    back = Bits(bits.size_bytes, GRANULE)
    back.add_packed(base + first, packed)
    assert back.packed(base, 262144) == model(
        [each for each in granules if first <= each < first + count], 0, 262144
    )


@pytest.mark.parametrize("count", [4095, 4096, 4097])
@pytest.mark.parametrize("step", [1, 2, 16])
def test_as_many_as_the_library_lists(count: int, step: int) -> None:
    """A list of 4096 numbers takes as many bytes as an array of bits."""
    granules = [*range(0, 65536, step)][:count]
    assert marked(granules, 65536).packed(0, 65536) == model(granules, 0, 65536)


def test_bits_beyond_the_end_are_dropped() -> None:
    bits = Bits(10 * GRANULE, GRANULE)
    bits.add_packed(0, b"\xff" * 8192)
    assert bits.count_bytes == 10 * GRANULE
    assert bits.packed(0, 64) == b"\xff\x03" + bytes(6)


def test_what_was_marked_stays() -> None:
    bits = marked([1], 100000)
    bits.add_packed(8, b"\x01")
    assert bits.packed(0, 16) == b"\x02\x01"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 140000), st.integers(1, 70000)), max_size=4),
    st.integers(0, 1000),
    st.integers(1, 20000),
)
def test_any_runs(runs: list[tuple[int, int]], first: int, count: int) -> None:
    bits = Bits(140000 * GRANULE, GRANULE)
    bits.update_runs((start, start + length) for start, length in runs)
    packed = bits.packed(8 * first, 8 * count)
    dirty = bits.extents(8 * first * GRANULE, 8 * count * GRANULE)
    assert int.from_bytes(packed, "little").bit_count() == sum(
        extent.length // GRANULE for extent in dirty
    )
    back = Bits(bits.size_bytes, GRANULE)
    back.add_packed(8 * first, packed)
    assert back.packed(8 * first, 8 * count) == packed
