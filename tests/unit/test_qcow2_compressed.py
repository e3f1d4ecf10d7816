"""Compressed clusters: whatever the stream says, there is one cluster or an error."""

from __future__ import annotations

import random
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.block.qcow2.compressed import compress, decompress
from blockd.block.qcow2.features import CompressionType

CLUSTER = 65536
KINDS = list(CompressionType)
TEXT = b"".join(b"%d, " % n for n in range(CLUSTER))[:CLUSTER]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [bytes(CLUSTER), TEXT, TEXT[:512]])
def test_round_trip_with_what_follows_in_the_sector(kind: CompressionType, content: bytes) -> None:
    packed = compress(kind, memoryview(content))
    assert packed is not None
    assert len(packed) < len(content) // 2
    following = random.Random(1).randbytes(511)
    assert decompress(kind, packed + following, len(content)) == content


@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_no_smaller_is_not_compressed(kind: CompressionType) -> None:
    assert compress(kind, random.Random(1).randbytes(CLUSTER)) is None


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        (CompressionType.ZLIB, deflated(bytes(1 << 28))),
        (CompressionType.ZSTD, zstandard.compress(bytes(1 << 28))),
    ],
)
def test_a_bomb_gives_one_cluster(kind: CompressionType, packed: bytes) -> None:
    assert decompress(kind, packed, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_ends_early_is_damaged(kind: CompressionType) -> None:
    short = compress(kind, TEXT[:-1])
    assert short is not None
    with pytest.raises(OSError, match="a compressed cluster is damaged"):
        decompress(kind, short, CLUSTER)
    whole = compress(kind, TEXT)
    assert whole is not None
    with pytest.raises(OSError, match="a compressed cluster is damaged"):
        decompress(kind, whole[: len(whole) // 2], CLUSTER)


@pytest.mark.parametrize("kind", KINDS)
def test_zeroes_are_no_stream(kind: CompressionType) -> None:
    with pytest.raises(OSError, match="a compressed cluster is damaged"):
        decompress(kind, bytes(512), CLUSTER)


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_damage_gives_a_cluster_or_an_error(
    kind: CompressionType, position: int, damage: bytes
) -> None:
    packed = compress(kind, TEXT)
    assert packed is not None
    damaged = packed[:position] + damage + packed[position + len(damage) :]
    try:
        content = decompress(kind, damaged, CLUSTER)
    except OSError:
        return
    assert len(content) == CLUSTER
