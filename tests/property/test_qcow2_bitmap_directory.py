"""Bitmap directories and tables: kept over a rewrite; damage is refused or makes sense.

``QCOW2_FUZZ_EXAMPLES`` sets how many damaged ones are tried; CI takes the default.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.block.qcow2.bitmap_directory import (
    BitmapEntry,
    BitmapFlag,
    build_directory,
    build_table,
    parse_directory,
    parse_table,
)
from blockd.block.qcow2.extensions import BitmapsExtension
from blockd.errors import BlockdError

CLUSTER = 65536
SIZE = 1 << 30
EXAMPLES = int(os.environ.get("QCOW2_FUZZ_EXAMPLES", "200"))

entries = st.builds(
    BitmapEntry,
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
    table_offset=st.integers(1, 1 << 30).map(lambda number: number * CLUSTER),
    table_words=st.integers(2, 8192),
    flags=st.sampled_from([BitmapFlag(0), *BitmapFlag, BitmapFlag.IN_USE | BitmapFlag.AUTO]),
    granularity_bits=st.integers(16, 31),
    extra_data=st.binary(max_size=20),
)
directories = st.lists(entries, min_size=1, max_size=5, unique_by=lambda entry: entry.name)


def parse(data: bytes, count: int) -> list[BitmapEntry]:
    extension = BitmapsExtension(count, len(data), 5 * CLUSTER)
    return parse_directory(data, extension, size_bytes=SIZE, cluster_size_bytes=CLUSTER)


@settings(deadline=None)
@given(directories)
def test_directories_survive_a_rewrite(directory: list[BitmapEntry]) -> None:
    data = build_directory(directory)
    assert parse(data, len(directory)) == directory
    for wrong in (len(directory) - 1, len(directory) + 1):
        with pytest.raises(BlockdError, match=r"(More|Less) bitmaps found than specified"):
            parse(data, wrong)
    with pytest.raises(BlockdError):
        parse(data[:-1], len(directory))


@settings(max_examples=EXAMPLES, deadline=None)
@given(directories, st.data())
def test_damaged_directories_are_refused_or_make_sense(
    directory: list[BitmapEntry], chance: st.DataObject
) -> None:
    data = bytearray(build_directory(directory))
    for _ in range(chance.draw(st.integers(1, 4))):
        data[chance.draw(st.integers(0, len(data) - 1))] = chance.draw(st.integers(0, 255))
    try:
        parsed = parse(bytes(data), len(directory))
    except BlockdError:
        return
    assert parse(build_directory(parsed), len(directory)) == parsed


@pytest.mark.parametrize(
    "change",
    [
        {"table_words": 0},
        {"table_words": 1},
        {"table_words": 8193},
        {"table_offset": 0},
        {"table_offset": CLUSTER + 512},
        {"granularity_bits": 8},
        {"granularity_bits": 32},
        {"flags": BitmapFlag(8)},
        {"name": ""},
        {"name": "n" * 1024},
    ],
)
def test_constraints(change: dict[str, Any]) -> None:
    data = build_directory([replace(BitmapEntry("b", CLUSTER, 2, BitmapFlag(0), 9), **change)])
    with pytest.raises(BlockdError, match="doesn't satisfy the constraints"):
        parse(data, 1)


def test_one_in_use_may_be_of_another_size() -> None:
    entry = BitmapEntry("b", CLUSTER, 1, BitmapFlag.IN_USE, 9)
    assert parse(build_directory([entry]), 1) == [entry]


def test_a_name_is_there_once() -> None:
    entry = BitmapEntry("b", CLUSTER, 4, BitmapFlag(0), 9)
    with pytest.raises(BlockdError, match="Bitmap 'b' is twice"):
        parse(build_directory([entry, entry]), 2)


def test_tables() -> None:
    words = [0, 1, CLUSTER, (1 << 56) - CLUSTER]
    assert parse_table(build_table(words), CLUSTER) == words
    for wrong in (2, CLUSTER + 1, CLUSTER + 512, 1 << 56, 1 << 63):
        with pytest.raises(ValueError, match="is not valid"):
            parse_table(build_table([wrong]), CLUSTER)
