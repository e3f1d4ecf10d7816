"""Bits: what a range marks, runs and windows, sizes that are no multiple, the peer's digests."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd import limits
from blockd.bitmap import Bits
from blockd.errors import BlockdError
from blockd.extent import Extent

TIB = 1 << 40


def granules(bits: Bits) -> set[int]:
    size = bits.granularity_bytes
    return {
        number
        for extent in bits.extents()
        for number in range(extent.offset // size, -(-extent.end // size))
    }


@pytest.mark.parametrize(
    ("offset", "length", "marked"),
    [
        (0, 1, {0}),
        (0, 512, {0}),
        (0, 513, {0, 1}),
        (511, 2, {0, 1}),
        (512, 0, set()),
        (1024, 512, {2}),
        (1200, 100, {2}),
        (1279, 10_000, {2}),
        (1280, 10, set()),
        (0, TIB, {0, 1, 2}),
    ],
)
def test_mark(offset: int, length: int, marked: set[int]) -> None:
    bits = Bits(1280, 512)
    bits.mark(offset, length)
    assert granules(bits) == marked
    assert bits.count_bytes == 512 * len(marked)
    assert bits.any() == bool(marked)


def test_last_granule_may_be_partial() -> None:
    bits = Bits(1280, 512)
    bits.mark_all()
    assert list(bits.extents()) == [Extent(0, 1280)]
    assert (bits.granule_count, bits.count_bytes) == (3, 1536)


def test_nothing_beyond_the_end() -> None:
    bits = Bits(1280, 512)
    bits.update_granules([2, 3, 1 << 40])
    bits.update_runs([(2, 7)])
    assert bits.count_bytes == 512


def test_no_bytes() -> None:
    bits = Bits(0, 512)
    bits.mark(0, 512)
    bits.mark_all()
    bits.update_granules([0])
    assert not bits.any()
    assert not list(bits.extents())
    assert not bits.intersects(0, 512)


@pytest.mark.parametrize(("size", "granularity"), [(-1, 512), (512, 0), (512, 768), (512, -512)])
def test_impossible_bits(size: int, granularity: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes by {granularity}"):
        Bits(size, granularity)


def test_granules_past_32_bits() -> None:
    bits = Bits(16 * TIB, 512)
    bits.mark(16 * TIB - 1, 1)
    bits.update_granules([(1 << 32) + 7])
    assert bits.count_bytes == 1024
    assert list(bits.extents()) == [
        Extent(((1 << 32) + 7) * 512, 512),
        Extent(16 * TIB - 512, 512),
    ]


def test_whole_disk_at_once() -> None:
    bits = Bits(16 * TIB, 65536)
    bits.mark(0, 16 * TIB)
    assert bits.count_bytes == 16 * TIB
    assert sum(extent.length for extent in bits.extents()) == 16 * TIB
    assert max(extent.length for extent in bits.extents()) == limits.BITMAP_WINDOW_GRANULES * 65536


@pytest.mark.parametrize(
    ("offset", "length", "found"),
    [
        (0, 1, False),
        (0, 1024, False),
        (0, 1025, True),
        (1535, 1, True),
        (1536, 512, False),
        (1025, 0, False),
        (1536, TIB, True),
        (2048, TIB, True),
        (2100, 10, False),
    ],
)
def test_intersects(offset: int, length: int, found: bool) -> None:
    bits = Bits(2100, 512)
    bits.mark(1024, 512)
    bits.mark(2048, 1)
    assert bits.intersects(offset, length) == found


# --- extents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "extents"),
    [
        (0, None, [(512, 1024), (2560, 140)]),
        (600, None, [(600, 936), (2560, 140)]),
        (600, 100, [(600, 100)]),
        (0, 512, []),
        (0, 513, [(512, 1)]),
        (1536, 1024, []),
        (2699, 500, [(2699, 1)]),
        (2700, 500, []),
        (2600, 0, []),
        (5000, None, []),
    ],
)
def test_extents_of_a_range(
    offset: int, length: int | None, extents: list[tuple[int, int]]
) -> None:
    bits = Bits(2700, 512)
    bits.update_granules([1, 2, 5])
    assert list(bits.extents(offset, length)) == extents


def test_extents_come_in_pieces_at_windows() -> None:
    bits = Bits(300 * 512, 512)
    bits.update_runs([(60, 130), (254, 258)])
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        pieces = [(extent.offset // 512, extent.length // 512) for extent in bits.extents()]
    assert pieces == [(60, 4), (64, 64), (128, 2), (254, 2), (256, 2)]


def change_by_marking(bits: Bits) -> None:
    bits.mark_all()


def change_by_clearing(bits: Bits) -> None:
    bits.clear()


def change_by_shrinking(bits: Bits) -> None:
    bits.resize(100 * 512 + 1)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (change_by_marking, [(10, 1), (20, 1), (64, 64), (128, 64), (192, 8)]),
        (change_by_clearing, [(10, 1), (20, 1)]),
        (change_by_shrinking, [(10, 1), (20, 1), (70, 1), (100, 1)]),
    ],
)
def test_bits_may_change_between_windows(
    change: Callable[[Bits], None], seen: list[tuple[int, int]]
) -> None:
    bits = Bits(200 * 512, 512)
    bits.update_granules([10, 20, 70, 100, 150])
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        extents = bits.extents()
        found = [next(extents)]
        change(bits)
        found += extents
    assert [(each.offset // 512, -(-each.length // 512)) for each in found] == seen


# --- merge, copy, resize ---------------------------------------------------------------------


def test_merge_refuses_other_sizes() -> None:
    bits = Bits(1 << 20, 65536)
    other = Bits((1 << 20) + 1536, 65536)
    other.mark_all()
    with pytest.raises(BlockdError) as refusal:
        bits.merge(other)
    # The peer's words, of qemu-storage-daemon 10.0.2.
    assert refusal.value.message == (
        "Bitmaps are of different sizes (destination size is 1048576, source size is 1050112) "
        "and can't be merged"
    )
    assert not bits.any()


def test_merge_with_itself() -> None:
    bits = Bits(1 << 20, 4096)
    bits.mark(5000, 1)
    bits.merge(bits)
    assert granules(bits) == {1}


def test_copy_is_independent() -> None:
    bits = Bits(8192, 512)
    bits.mark(0, 1)
    copied, empty = bits.copy(), bits.empty_copy()
    bits.mark(512, 1)
    assert granules(copied) == {0}
    assert not empty.any()
    assert (copied.size_bytes, copied.granularity_bytes) == (8192, 512)


def test_resize() -> None:
    bits = Bits(2048, 512)
    bits.mark_all()
    bits.resize(1025)
    assert granules(bits) == {0, 1, 2}
    bits.resize(4096)
    assert granules(bits) == {0, 1, 2}
    bits.resize(0)
    bits.resize(4096)
    assert not bits.any()


SIZES = st.integers(0, 40_000)
GRANULARITIES = st.sampled_from([512, 1024, 4096, 16384])
NUMBERS = st.sets(st.integers(0, 90))


@given(SIZES, GRANULARITIES, NUMBERS, st.integers(0, 50_000), st.integers(0, 50_000))
def test_extents_against_a_set(
    size: int, granularity: int, numbers: set[int], offset: int, length: int
) -> None:
    bits = Bits(size, granularity)
    bits.update_granules(numbers)
    dirty = {
        byte
        for number in numbers
        for byte in range(number * granularity, min((number + 1) * granularity, size))
    }
    wanted = dirty & set(range(offset, offset + length))
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        extents = list(bits.extents(offset, length))
        assert set(granules(bits)) == {number for number in numbers if number * granularity < size}
    assert {byte for extent in extents for byte in range(extent.offset, extent.end)} == wanted
    assert sum(extent.length for extent in extents) == len(wanted)
    if length:
        first, last = offset // granularity, (offset + length - 1) // granularity
        touched = any(n * granularity < size and first <= n <= last for n in numbers)
        assert bits.intersects(offset, length) == (touched and offset < size)


@given(SIZES, GRANULARITIES, NUMBERS, GRANULARITIES, NUMBERS)
def test_merge_rounds_outward(
    size: int, granularity: int, numbers: set[int], other_granularity: int, others: set[int]
) -> None:
    bits, other = Bits(size, granularity), Bits(size, other_granularity)
    bits.update_granules(numbers)
    other.update_granules(others)
    wanted = granules(bits) | {
        byte // granularity
        for number in granules(other)
        for byte in range(
            number * other_granularity,
            min((number + 1) * other_granularity, size),
            min(granularity, other_granularity),
        )
    }
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        bits.merge(other)
    assert granules(bits) == wanted


# --- digest ----------------------------------------------------------------------------------

PEER_SIZE = (1 << 20) + 1536
PEER_WRITES = [(1000 * 1024, 1), (0, 1), (4095, 2), (1049600, 512)]


@pytest.mark.parametrize(
    ("granularity", "digest"),
    [
        (512, "13a77d4adeb33d4dd8dac6249b5ea79f6c9a185d2acb185e33f250b6b5884e03"),
        (4096, "ce29eb074ac62eec119e08fd8d3c08d59c292deb7ae2f094bcb7b70088e0d0d5"),
        (65536, "bae3c3f99ea3af672bc4b48cf5907454332b584d96792f40b3910c72718d4f54"),
        (131072, "39fea3826fc58aa57b8cef4aacbd702ee4241536520c5550537182296a06315b"),
        (2097152, "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8"),
    ],
)
def test_digest_is_the_peers(granularity: int, digest: str) -> None:
    """What qemu-storage-daemon 10.0.2 answered after these writes."""
    bits = Bits(PEER_SIZE, granularity)
    for offset, length in PEER_WRITES:
        bits.mark(offset, length)
    assert bits.digest() == digest
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        assert bits.digest() == digest


def test_digest_of_the_peers_merge() -> None:
    """Merged there from granularity 65536 into 512, the end of the disk being no multiple."""
    coarse, fine = Bits(PEER_SIZE, 65536), Bits(PEER_SIZE, 512)
    for offset, length in PEER_WRITES:
        coarse.mark(offset, length)
    fine.merge(coarse)
    assert fine.count_bytes == 132608
    assert fine.digest() == "e8cfd91fcdb628b5e25270575f0d16c80eb2e4dd355ba2b7931d92560f33c944"


@pytest.mark.parametrize(
    ("size", "granularity", "digest"),
    [
        (0, 65536, "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
        (1 << 20, 512, "5341e6b2646979a70e57653007a1f310169421ec9bdd9f1a5648f75ade005af1"),
        (PEER_SIZE, 512, "44b8aa4d28701168922acf61435ea4bb442f97b0b14ad7a2510ed68874ee2a72"),
    ],
)
def test_digest_of_clean_bits(size: int, granularity: int, digest: str) -> None:
    assert Bits(size, granularity).digest() == digest
