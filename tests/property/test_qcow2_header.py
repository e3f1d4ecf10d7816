"""Damaged qcow2 headers: refused with a sentence, or read as something that can be rewritten.

``QCOW2_FUZZ_EXAMPLES`` sets how many are tried; CI takes the default.
"""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.block.qcow2.extensions import BitmapsExtension, Extensions
from blockd.block.qcow2.features import Autoclear
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.parsing import parse_header
from blockd.errors import BlockdError

FILE_SIZE = 1 << 20
EXAMPLES = int(os.environ.get("QCOW2_FUZZ_EXAMPLES", "200"))

GOOD = Header(
    version=3,
    cluster_bits=12,
    size_bytes=1 << 24,
    l1_size=16,
    l1_table_offset=12 << 12,
    refcount_table_offset=4096,
    refcount_table_clusters=1,
    nb_snapshots=1,
    snapshots_offset=20 << 12,
    autoclear=int(Autoclear.BITMAPS),
    backing_file="base.raw",
    extensions=Extensions(
        backing_format="raw", bitmaps=BitmapsExtension(1, 32, 30 << 12), unknown=((77, b"kept"),)
    ),
).build()

#: Where fields and extensions are, and what breaks them.
positions = st.integers(0, 260)
values = st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.tuples(positions, values), min_size=1, max_size=8))
def test_damaged_headers_are_refused_or_make_sense(damage: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in damage:
        data[position] = value
    try:
        header = parse_header(bytes(data), FILE_SIZE)
    except BlockdError:
        return
    try:
        built = header.build()
    except BlockdError:
        return  # The damage left no room, say by a length in what is unknown.
    rebuilt = replace(header, extensions=replace(header.extensions, stale_bitmaps=False))
    assert parse_header(built, FILE_SIZE) == rebuilt
