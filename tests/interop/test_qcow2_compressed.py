"""Compressed clusters of qemu-img are read by us, and ours by it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from blockd.block.qcow2.compressed import compress, decompress
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.parsing import HEADER_BYTES, parse_header
from tests.helpers.qcow2 import options, qemu_img

CLUSTERS = 20


def content_of(size: int) -> bytes:
    """Clusters that compress well, badly, and hardly."""
    chance = random.Random(5)
    return b"".join(
        chance.randbytes(size * n // CLUSTERS).ljust(size, bytes([n + 1])) for n in range(CLUSTERS)
    )


def make(path: Path, kind: str, cluster_bytes: int) -> bytes:
    content = content_of(cluster_bytes)
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    made = options(f"compression_type={kind}", f"cluster_size={cluster_bytes}")
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *made, raw, path)
    return content


def compressed_clusters(path: Path) -> dict[int, tuple[int, int]]:
    """Guest cluster to (offset, length) of its bytes, from the image's own tables."""
    data = path.read_bytes()
    header = parse_header(data[:HEADER_BYTES], len(data))
    (l1_entry,) = struct.unpack_from(">Q", data, header.l1_table_offset)
    shift = 62 - (header.cluster_bits - 8)
    found = {}
    for cluster in range(CLUSTERS):
        (entry,) = struct.unpack_from(">Q", data, (l1_entry & ~(1 << 63)) + 8 * cluster)
        if entry & (1 << 62):
            offset = entry & ((1 << shift) - 1)
            sectors = ((entry & ~(1 << 62)) >> shift) + 1
            found[cluster] = (offset, sectors * 512 - offset % 512)
    return found


@pytest.mark.parametrize("kind", list(CompressionType), ids=lambda kind: kind.name)
@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 << 20])
def test_clusters_of_qemu_are_read(
    tmp_path: Path, kind: CompressionType, cluster_bytes: int
) -> None:
    path = tmp_path / "image"
    content = make(path, kind.name.lower(), cluster_bytes)
    data = path.read_bytes()
    found = compressed_clusters(path)
    assert found
    for cluster, (offset, length) in found.items():
        packed = data[offset : offset + length]
        start = cluster * cluster_bytes
        assert decompress(kind, packed, cluster_bytes) == content[start : start + cluster_bytes]


@pytest.mark.parametrize("kind", list(CompressionType), ids=lambda kind: kind.name)
def test_qemu_reads_clusters_of_ours(tmp_path: Path, kind: CompressionType) -> None:
    """Other content, packed by us, in the place of what QEMU has compressed."""
    path = tmp_path / "image"
    content = bytearray(make(path, kind.name.lower(), 65536))
    data = bytearray(path.read_bytes())
    for cluster, (offset, length) in compressed_clusters(path).items():
        mine = bytes([cluster + 100]) * 65536
        packed = compress(kind, mine)
        assert packed is not None
        assert len(packed) <= length
        data[offset : offset + len(packed)] = packed
        content[cluster * 65536 : (cluster + 1) * 65536] = mine
    path.write_bytes(data)
    path.with_suffix(".raw").write_bytes(content)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", path.with_suffix(".raw"), path)
