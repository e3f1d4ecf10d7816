"""An image's first bytes to its header: every rule of the specification held, in QEMU's words."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from blockd import limits
from blockd.block.qcow2.extensions import Extensions, ExtensionType, split, to_text
from blockd.block.qcow2.features import (
    INCOMPATIBLE_MASK,
    Autoclear,
    CompressionType,
    Incompatible,
    describe_unknown,
)
from blockd.block.qcow2.header import (
    BACKING_NAME_BYTES,
    DEFAULT_REFCOUNT_ORDER,
    FIXED_FIELDS,
    KNOWN_LENGTH_BYTES,
    MAGIC,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    SUBCLUSTERS,
    VERSION3_FIELDS,
    VERSION3_LENGTH_BYTES,
    Header,
)
from blockd.errors import BlockdError
from blockd.extent import Extent

#: So much of a file's beginning is enough to parse the header of any image.
HEADER_BYTES = 1 << MAX_CLUSTER_BITS

_SECTOR_BYTES = 512
_TABLE_ENTRY_BYTES = 8
#: QEMU computes offsets with this as their end.
_MAX_OFFSET = 2**63 - 1
_MAX_L1_INDEX = 2**31 - 1
#: A snapshot's entry takes this at the least.
_SNAPSHOT_ENTRY_BYTES = 40


class _Fixed(NamedTuple):
    """The fields that every version has, in their order."""

    magic: bytes
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int


class _Version3(NamedTuple):
    """The fields that version 3 added, in their order."""

    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = DEFAULT_REFCOUNT_ORDER
    header_length: int = FIXED_FIELDS.size


def parse_header(data: bytes, file_size_bytes: int) -> Header:
    """Read the header from the file's first ``HEADER_BYTES`` (or all of a shorter file).

    Raises ``BlockdError`` where the specification forbids what is there, or blockd can't
    handle it.
    """
    fixed = _parse_fixed(data)
    cluster_size = 1 << fixed.cluster_bits
    cluster = data[:cluster_size].ljust(cluster_size, b"\0")
    version3 = _parse_version3(cluster, fixed)
    compression = _parse_compression(cluster, version3)
    _check_incompatible(cluster, fixed, version3)
    _check_simple_limits(fixed, version3)
    header = Header(
        version=fixed.version,
        cluster_bits=fixed.cluster_bits,
        # QEMU counts whole sectors.
        size_bytes=fixed.size - fixed.size % _SECTOR_BYTES,
        l1_size=fixed.l1_size,
        l1_table_offset=fixed.l1_table_offset,
        refcount_table_offset=fixed.refcount_table_offset,
        refcount_table_clusters=fixed.refcount_table_clusters,
        nb_snapshots=fixed.nb_snapshots,
        snapshots_offset=fixed.snapshots_offset,
        incompatible=version3.incompatible,
        compatible=version3.compatible,
        autoclear=version3.autoclear,
        refcount_order=version3.refcount_order,
        compression_type=compression,
        unknown_fields=cluster[KNOWN_LENGTH_BYTES : version3.header_length],
    )
    _check_tables(header, fixed.size)
    header = replace(
        header,
        extensions=Extensions.parse(
            _extension_area(cluster, fixed, version3),
            cluster_size_bytes=cluster_size,
            bitmaps_consistent=bool(version3.autoclear & Autoclear.BITMAPS),
        ),
        backing_file=_parse_backing_file(cluster, fixed),
    )
    _check_features(header)
    _check_layout(header, file_size_bytes)
    return header


def _parse_fixed(data: bytes) -> _Fixed:
    fixed = _Fixed(*FIXED_FIELDS.unpack(data[: FIXED_FIELDS.size].ljust(FIXED_FIELDS.size, b"\0")))
    if fixed.magic != MAGIC:
        raise BlockdError("Image is not in qcow2 format")
    if fixed.version not in {2, 3}:
        raise BlockdError(f"Unsupported qcow2 version {fixed.version}")
    if not MIN_CLUSTER_BITS <= fixed.cluster_bits <= MAX_CLUSTER_BITS:
        raise BlockdError(f"Unsupported cluster size: 2^{fixed.cluster_bits}")
    return fixed


def _parse_version3(cluster: bytes, fixed: _Fixed) -> _Version3:
    version3 = _Version3()
    if fixed.version >= 3:
        version3 = _Version3(*VERSION3_FIELDS.unpack_from(cluster, FIXED_FIELDS.size))
        if version3.header_length < VERSION3_LENGTH_BYTES:
            raise BlockdError("qcow2 header too short")
        if version3.header_length > len(cluster):
            raise BlockdError("qcow2 header exceeds cluster size")
        if version3.header_length % 8:
            raise BlockdError("qcow2 header length is not a multiple of 8")
    if fixed.backing_file_offset > len(cluster):
        raise BlockdError("Invalid backing file offset")
    if 0 < fixed.backing_file_offset < version3.header_length:
        raise BlockdError("Invalid backing file offset")
    return version3


def _parse_compression(cluster: bytes, version3: _Version3) -> CompressionType:
    number = cluster[VERSION3_LENGTH_BYTES] if version3.header_length > VERSION3_LENGTH_BYTES else 0
    if number not in CompressionType.__members__.values():
        raise BlockdError(f"qcow2: unknown compression type: {number}")
    marked = bool(version3.incompatible & Incompatible.COMPRESSION_TYPE)
    if marked != (number != CompressionType.ZLIB):
        raise BlockdError(
            "qcow2: Compression type incompatible feature bit must "
            f"{'not be' if marked else 'be'} set"
        )
    return CompressionType(number)


def _extension_area(cluster: bytes, fixed: _Fixed, version3: _Version3) -> bytes:
    return cluster[version3.header_length : fixed.backing_file_offset or len(cluster)]


def _check_incompatible(cluster: bytes, fixed: _Fixed, version3: _Version3) -> None:
    unknown = version3.incompatible & ~INCOMPATIBLE_MASK
    if not unknown:
        return
    names = b""
    try:
        for kind, data in split(_extension_area(cluster, fixed, version3)):
            names = data if kind == ExtensionType.FEATURE_NAMES else names
    except BlockdError:
        pass  # A newer format may arrange them in another way; what was found is enough.
    raise BlockdError(f"Unsupported qcow2 feature(s): {describe_unknown(unknown, names)}")


def _check_simple_limits(fixed: _Fixed, version3: _Version3) -> None:
    if version3.incompatible & Incompatible.EXTENDED_L2:
        subcluster = (1 << fixed.cluster_bits) // SUBCLUSTERS
        if subcluster < _SECTOR_BYTES:
            raise BlockdError(f"Unsupported subcluster size: {subcluster}")
    if version3.refcount_order > 6:
        raise BlockdError("Reference count entry width too large; may not exceed 64 bits")
    if fixed.crypt_method:
        raise BlockdError(
            "Encrypted qcow2 images are not supported; 'qemu-img convert' makes an unencrypted one"
        )


def _parse_backing_file(cluster: bytes, fixed: _Fixed) -> str | None:
    start, length = fixed.backing_file_offset, fixed.backing_file_size
    if not start:
        return None
    if length > min(BACKING_NAME_BYTES, len(cluster) - start):
        raise BlockdError("Backing file name too long")
    return to_text(cluster[start : start + length])


def _check_tables(header: Header, size_bytes: int) -> None:
    """In QEMU's order, so that an image with several faults is refused with its words."""
    if not header.refcount_table_clusters:
        raise BlockdError("Image does not contain a reference count table")
    _check_table(
        header,
        "Reference count table",
        header.refcount_table_offset,
        header.refcount_table_clusters << header.cluster_bits,
        limits.QCOW2_REFCOUNT_TABLE_BYTES,
    )
    _check_table(
        header,
        "Snapshot table",
        header.snapshots_offset,
        header.nb_snapshots * _SNAPSHOT_ENTRY_BYTES,
        limits.QCOW2_SNAPSHOTS * _SNAPSHOT_ENTRY_BYTES,
    )
    _check_table(
        header,
        "Active L1 table",
        header.l1_table_offset,
        header.l1_size * _TABLE_ENTRY_BYTES,
        limits.QCOW2_L1_TABLE_BYTES,
    )
    needed = header.l1_entries_for(size_bytes)
    if needed > _MAX_L1_INDEX:
        raise BlockdError("Image is too big")
    if header.l1_size < needed:
        raise BlockdError("L1 table is too small")


def _check_table(header: Header, name: str, offset: int, length: int, most: int) -> None:
    if length > most:
        raise BlockdError(f"{name} too large")
    if offset % header.cluster_size_bytes or offset > _MAX_OFFSET - length:
        raise BlockdError(f"{name} offset invalid")


def _check_features(header: Header) -> None:
    if header.autoclear & Autoclear.BITMAPS and header.extensions.bitmaps is None:
        raise BlockdError("The bitmaps feature bit is set without a bitmaps extension")
    if header.data_file_raw and not header.has_data_file:
        raise BlockdError("data-file-raw requires a data file")
    if header.data_file_raw and header.backing_file is not None:
        raise BlockdError("Backing file and data-file-raw cannot be used at the same time")
    if header.has_data_file and header.nb_snapshots:
        raise BlockdError("Internal snapshots cannot be used with an external data file")


def _check_layout(header: Header, file_size_bytes: int) -> None:
    """Each table must start inside the file; its unwritten end may be missing."""
    last_name, last_end = "the header", header.cluster_size_bytes
    for extent, name in sorted(_tables(header)):
        if extent.offset >= file_size_bytes:
            raise BlockdError(f"{name} lies beyond the end of the file")
        if extent.offset < last_end:
            raise BlockdError(f"{name} overlaps {last_name}")
        last_name, last_end = name, extent.end


def _tables(header: Header) -> list[tuple[Extent, str]]:
    """What the header points at and takes room."""
    bitmaps = header.extensions.bitmaps
    refcounts = header.refcount_table_clusters << header.cluster_bits
    tables = [
        (Extent(header.refcount_table_offset, refcounts), "Reference count table"),
        (
            Extent(header.snapshots_offset, header.nb_snapshots * _SNAPSHOT_ENTRY_BYTES),
            "Snapshot table",
        ),
        (Extent(header.l1_table_offset, header.l1_size * _TABLE_ENTRY_BYTES), "Active L1 table"),
    ]
    if bitmaps is not None:
        directory = Extent(bitmaps.directory_offset, bitmaps.directory_size_bytes)
        tables.append((directory, "Bitmap directory"))
    return [(extent, name) for extent, name in tables if extent.length]
