"""Options of a new image that don't go together; the words are compared with QEMU's elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.image_options import ImageOptions, Preallocation
from blockd.block.qcow2.layout import plan_image
from blockd.errors import BlockdError

PLAIN = ImageOptions(1 << 30)


@pytest.mark.parametrize(
    ("image", "refusal"),
    [
        (replace(PLAIN, size_bytes=1000), "Image size must be a multiple of 512 bytes"),
        (replace(PLAIN, size_bytes=-512), "cannot be negative"),
        (replace(PLAIN, size_bytes=1 << 62), "Failed to grow the L1 table: File too large"),
        (replace(PLAIN, size_bytes=(1 << 63) - 512), "exceeds maximum"),
        (replace(PLAIN, version=2, extended_l2=True), "Extended L2 entries are only supported"),
        (replace(PLAIN, cluster_size_bytes=1000), "Cluster size must be a power of two"),
        (replace(PLAIN, cluster_size_bytes=256), "Cluster size must be a power of two"),
        (replace(PLAIN, cluster_size_bytes=4 << 20), "between 512 and 2048k"),
        (replace(PLAIN, cluster_size_bytes=8192, extended_l2=True), "at least 16384 bytes"),
        (
            replace(PLAIN, backing_file="b", preallocation=Preallocation.FULL),
            "Backing file and preallocation",
        ),
        (replace(PLAIN, backing_format="raw"), "Backing format cannot be used"),
        (replace(PLAIN, backing_file="b" * 1024), "Backing file name too long"),
        (replace(PLAIN, version=2, lazy_refcounts=True), "Lazy refcounts only supported"),
        (replace(PLAIN, refcount_bits=0), "Refcount width must be a power of two"),
        (replace(PLAIN, refcount_bits=3), "Refcount width must be a power of two"),
        (replace(PLAIN, version=2, refcount_bits=8), "Different refcount widths"),
        (replace(PLAIN, data_file_raw=True), "data-file-raw requires data-file"),
        (
            replace(PLAIN, data_file="d", data_file_raw=True, backing_file="b"),
            "Backing file and data-file-raw",
        ),
        (replace(PLAIN, version=2, data_file="d"), "External data files are only supported"),
        (
            replace(PLAIN, version=2, compression_type=CompressionType.ZSTD),
            "Non-zlib compression type",
        ),
        (
            replace(
                PLAIN,
                size_bytes=1 << 37,
                cluster_size_bytes=512,
                refcount_bits=64,
                preallocation=Preallocation.METADATA,
            ),
            "reference count table would be too large",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(image: ImageOptions, refusal: str) -> None:
    with pytest.raises(BlockdError) as refused:
        plan_image(image)
    assert refusal in refused.value.message


def test_a_huge_image_is_laid_out_in_no_time_and_built_in_pieces() -> None:
    layout = plan_image(replace(PLAIN, size_bytes=1 << 50, preallocation=Preallocation.METADATA))
    assert layout.end > 1 << 50
    sizes = (len(piece) for _, piece in layout.tables())
    assert max(next(sizes) for _ in range(8)) <= 1 << 20
