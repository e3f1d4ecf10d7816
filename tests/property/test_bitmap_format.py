"""Pieces of a stored bitmap: what goes in comes out, and no damage passes for bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap64

from blockd import limits
from blockd.bitmap import Bits, NodeBitmaps
from blockd.bitmap.format import DamagedPieceError, pack_piece, unpack_piece

GRANULES = limits.BITMAP_PIECE_GRANULES
WINDOWS = st.sampled_from([0, 1, 7, 1 << 20, 1 << 33])
RUNS = st.lists(st.tuples(st.integers(0, GRANULES - 1), st.integers(1, 5000)), max_size=20)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, BitMap64]:
    window = draw(WINDOWS)
    granules = BitMap64()
    for first, length in draw(RUNS):
        granules.add_range(
            window * GRANULES + first, window * GRANULES + min(first + length, GRANULES)
        )
    return window, granules


@given(pieces())
def test_a_piece_is_read_as_it_was_written(piece: tuple[int, BitMap64]) -> None:
    window, granules = piece
    assert unpack_piece(window, pack_piece(window, granules)) == granules


@given(pieces(), st.data())
def test_damage_is_found(piece: tuple[int, BitMap64], data: st.DataObject) -> None:
    window, granules = piece
    packed = bytearray(pack_piece(window, granules))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedPieceError):
        unpack_piece(window, bytes(packed))


@given(pieces(), st.data())
def test_a_piece_cut_short_or_too_long_is_found(
    piece: tuple[int, BitMap64], data: st.DataObject
) -> None:
    window, granules = piece
    packed = pack_piece(window, granules)
    with pytest.raises(DamagedPieceError):
        unpack_piece(window, packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(DamagedPieceError):
        unpack_piece(window, packed + data.draw(st.binary(min_size=1, max_size=40)))


@given(pieces())
def test_another_windows_piece_is_found(piece: tuple[int, BitMap64]) -> None:
    window, granules = piece
    with pytest.raises(DamagedPieceError):
        unpack_piece(window + 1, pack_piece(window, granules))


@given(st.integers(1, 3 * GRANULES), RUNS)
def test_the_pieces_of_a_bitmap_are_all_of_it(count: int, runs: list[tuple[int, int]]) -> None:
    node = NodeBitmaps(count * 512)
    bitmap = node.add("b", 512)
    bits = Bits(count * 512, 512)
    bits.update_runs((3 * first, 3 * first + length) for first, length in runs)
    bitmap.put_back(bits.copy())
    found = Bits(count * 512, 512)
    for window in range(bitmap.window_count):
        found.add_granules(unpack_piece(window, pack_piece(window, bitmap.window(window))))
    assert found.digest() == bits.digest()


def test_a_frozen_bitmap_is_kept_as_its_reclaim_leaves_it() -> None:
    node = NodeBitmaps(1024 * 512)
    bitmap = node.add("b", 512)
    node.recent.append((0, 512))
    freeze = bitmap.freeze("job")
    node.recent.append((5 * 512, 512))
    assert bitmap.window(0) == BitMap64([0, 5])
    freeze.reclaim()
    assert bitmap.window(0) == BitMap64([0, 5])
