"""The published bitmap vectors."""

from __future__ import annotations

from typing import Any

import pytest

from blockd.bitmap import NodeBitmaps
from tests.helpers.vectors import named

VECTORS = named("bitmap.json", "bitmaps")


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector(vector: dict[str, Any]) -> None:
    bitmap = bitmap_of(vector)
    if "merge" in vector:
        other = bitmap_of({"size": vector["size"], **vector["merge"]})
        bitmap.merge_from([other.usable_bits()])
    bits = bitmap.usable_bits()
    assert [[each.offset, each.length] for each in bits.extents()] == vector["extents"]
    assert bitmap.count_bytes == vector["count"]
    assert bits.digest() == vector["sha256"]


def bitmap_of(vector: dict[str, Any]) -> Any:
    bitmaps = NodeBitmaps(vector["size"])
    bitmap = bitmaps.add("b", vector["granularity"])
    bitmaps.recent.extend((offset, length) for offset, length in vector["writes"])
    return bitmap
