"""The qcow2 header: what is kept over a rewrite, and what only blockd refuses."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from blockd.block.qcow2.extensions import BitmapsExtension, Extensions
from blockd.block.qcow2.features import Autoclear, Compatible, Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.parsing import parse_header
from blockd.errors import BlockdError

CLUSTER = 65536
FILE_SIZE = 16 * CLUSTER

PLAIN = Header(
    version=3,
    cluster_bits=16,
    size_bytes=1 << 30,
    l1_size=2,
    l1_table_offset=3 * CLUSTER,
    refcount_table_offset=CLUSTER,
    refcount_table_clusters=1,
)
BITMAPS = BitmapsExtension(nb_bitmaps=2, directory_size_bytes=64, directory_offset=5 * CLUSTER)


def parse(header: Header) -> Header:
    return parse_header(header.build(), FILE_SIZE)


@pytest.mark.parametrize(
    "header",
    [
        PLAIN,
        replace(PLAIN, version=2),
        replace(PLAIN, compatible=Compatible.LAZY_REFCOUNTS | 1 << 60, autoclear=1 << 63),
        replace(PLAIN, backing_file="dir/\udcff name", unknown_fields=bytes(range(16))),
        replace(PLAIN, extensions=Extensions(unknown=((7, b"seven"), (9, b"")))),
        replace(
            PLAIN,
            autoclear=Autoclear.BITMAPS,
            extensions=Extensions(backing_format="raw", bitmaps=BITMAPS),
            nb_snapshots=2,
            snapshots_offset=6 * CLUSTER,
        ),
        replace(
            PLAIN,
            incompatible=Incompatible.DATA_FILE | Incompatible.EXTENDED_L2,
            autoclear=Autoclear.DATA_FILE_RAW,
            extensions=Extensions(data_file="data.raw"),
            l1_size=4,
        ),
    ],
)
def test_headers_survive_a_rewrite(header: Header) -> None:
    assert parse(header) == header


def test_an_older_header_gets_the_fields_it_lacks() -> None:
    data = bytearray(PLAIN.build())
    struct.pack_into(">I", data, 100, 104)
    del data[104:112]
    assert parse_header(bytes(data), FILE_SIZE) == PLAIN


def test_before_writing_what_nobody_keeps_up_to_date_goes() -> None:
    header = replace(PLAIN, autoclear=Autoclear.BITMAPS | 1 << 5 | 1 << 40)
    header = replace(header, extensions=Extensions(bitmaps=BITMAPS))
    assert parse(header).for_writing() == replace(header, autoclear=Autoclear.BITMAPS)


@pytest.mark.parametrize("version", [2, 3])
def test_bitmaps_without_their_bit_are_stale_and_go_before_writing(version: int) -> None:
    stored = replace(PLAIN, version=version, extensions=Extensions(bitmaps=BITMAPS))
    header = parse(stored)
    assert header.extensions == Extensions(stale_bitmaps=True)
    assert header.for_writing() == replace(stored, extensions=Extensions())


def test_a_corrupt_image_is_not_written_to() -> None:
    header = parse(replace(PLAIN, incompatible=int(Incompatible.CORRUPT)))
    with pytest.raises(BlockdError, match=r"Image is corrupt; cannot be opened read/write"):
        header.for_writing()


def test_sizes_are_those_of_the_specification() -> None:
    assert (PLAIN.refcount_bits, PLAIN.refcount_block_entries) == (16, 32768)
    assert (PLAIN.l2_entries, PLAIN.subcluster_size_bytes) == (8192, CLUSTER)
    extended = replace(PLAIN, incompatible=int(Incompatible.EXTENDED_L2))
    assert (extended.l2_entries, extended.subcluster_size_bytes) == (4096, 2048)
    assert PLAIN.l1_entries_for((1 << 29) + 1) == 2


@pytest.mark.parametrize(
    ("header", "refusal"),
    [
        (replace(PLAIN, l1_table_offset=0), "Active L1 table overlaps the header"),
        (
            replace(PLAIN, l1_table_offset=CLUSTER, refcount_table_clusters=2),
            "Reference count table overlaps Active L1 table",
        ),
        (
            replace(PLAIN, l1_table_offset=2 * CLUSTER, refcount_table_clusters=2),
            "Active L1 table overlaps Reference count table",
        ),
        (
            replace(PLAIN, nb_snapshots=1, snapshots_offset=3 * CLUSTER),
            "Snapshot table overlaps Active L1 table",
        ),
        (
            replace(PLAIN, l1_table_offset=FILE_SIZE),
            "Active L1 table lies beyond the end of the file",
        ),
        (
            replace(PLAIN, refcount_table_offset=1 << 40),
            "Reference count table lies beyond the end of the file",
        ),
        (
            replace(PLAIN, autoclear=int(Autoclear.BITMAPS)),
            "The bitmaps feature bit is set without a bitmaps extension",
        ),
        (
            replace(
                PLAIN,
                incompatible=int(Incompatible.DATA_FILE),
                autoclear=int(Autoclear.DATA_FILE_RAW),
                backing_file="base",
            ),
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            replace(
                PLAIN,
                incompatible=int(Incompatible.DATA_FILE),
                nb_snapshots=1,
                snapshots_offset=6 * CLUSTER,
            ),
            "Internal snapshots cannot be used with an external data file",
        ),
        (
            replace(PLAIN, extensions=Extensions(unknown=((7, b""), (7, b"")))),
            "Header extension 0x00000007 appears more than once",
        ),
        (replace(PLAIN, size_bytes=2**64 - 512), "Image is too big"),
        (replace(PLAIN, unknown_fields=bytes(4)), "qcow2 header length is not a multiple of 8"),
    ],
)
def test_what_qemu_opens_but_the_specification_forbids(header: Header, refusal: str) -> None:
    with pytest.raises(BlockdError) as refused:
        parse(header)
    assert refused.value.message == refusal


@pytest.mark.parametrize("method", [1, 2, 3])
def test_encrypted_images_are_refused(method: int) -> None:
    data = bytearray(PLAIN.build())
    struct.pack_into(">I", data, 32, method)
    with pytest.raises(BlockdError, match="Encrypted qcow2 images are not supported"):
        parse_header(bytes(data), FILE_SIZE)


def test_a_backing_file_name_does_not_lie_in_the_header() -> None:
    data = bytearray(PLAIN.build())
    struct.pack_into(">QI", data, 8, 104, 4)
    with pytest.raises(BlockdError, match="Invalid backing file offset"):
        parse_header(bytes(data), FILE_SIZE)


def test_names_that_do_not_fit_are_refused() -> None:
    small = replace(PLAIN, cluster_bits=9, backing_file="b" * 400)
    with pytest.raises(BlockdError, match="don't fit into a cluster of 512 bytes"):
        small.build()
    with pytest.raises(BlockdError, match="Backing file name too long"):
        replace(PLAIN, backing_file="b" * 1024).build()


@pytest.mark.parametrize("length", [0, 3, 71])
def test_what_is_too_short_is_no_image(length: int) -> None:
    with pytest.raises(BlockdError):
        parse_header(PLAIN.build()[:length], length)
