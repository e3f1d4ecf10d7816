"""The image header (specification, "Header") as a value; ``parsing`` reads it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

from blockd.block.qcow2.extensions import Extensions, to_bytes
from blockd.block.qcow2.features import (
    AUTOCLEAR_MASK,
    Autoclear,
    Compatible,
    CompressionType,
    Incompatible,
)
from blockd.errors import BlockdError

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
#: Parts of a cluster that extended L2 entries tell apart.
SUBCLUSTERS = 32
#: Bytes in a backing file's name, by the specification.
BACKING_NAME_BYTES = 1023

#: The fields of every version, and those that version 3 added.
FIXED_FIELDS = struct.Struct(">4sIQIIQIIQQIIQ")
VERSION3_FIELDS = struct.Struct(">QQQII")
VERSION3_LENGTH_BYTES = FIXED_FIELDS.size + VERSION3_FIELDS.size
#: With the compression type and its padding; what lies after it is kept, but not understood.
KNOWN_LENGTH_BYTES = VERSION3_LENGTH_BYTES + 8
#: Version 2 has 16 bits for each refcount.
DEFAULT_REFCOUNT_ORDER = 4
#: In smaller clusters there is little room, and QEMU leaves the feature names out.
_NAMES_ABOVE_CLUSTER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """One image's header. Offsets and sizes in bytes, but for ``l1_size`` (entries).

    Invariant of one that was parsed: its tables lie on cluster borders, start inside the file,
    are no larger than the limits, and overlap neither each other nor the header.
    """

    version: int
    cluster_bits: int
    size_bytes: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = DEFAULT_REFCOUNT_ORDER
    compression_type: CompressionType = CompressionType.ZLIB
    backing_file: str | None = None
    extensions: Extensions = field(default_factory=Extensions)
    #: The fields of a newer format, which are kept.
    unknown_fields: bytes = b""

    def build(self) -> bytes:
        """The header's cluster. Raises ``BlockdError`` where it takes more than one."""
        fields = self._v3_fields() if self.version >= 3 else b""
        area = self.extensions.build(
            with_names=self.version >= 3 and self.cluster_size_bytes > _NAMES_ABOVE_CLUSTER_BYTES
        )
        name = to_bytes(self.backing_file or "")
        name_offset = FIXED_FIELDS.size + len(fields) + len(area)
        if len(name) > BACKING_NAME_BYTES:
            raise BlockdError("Backing file name too long")
        if name_offset + len(name) > self.cluster_size_bytes:
            raise BlockdError(
                "The image's header and the names in it don't fit into a cluster of "
                f"{self.cluster_size_bytes} bytes; use larger clusters or shorter names"
            )
        fixed = FIXED_FIELDS.pack(
            MAGIC,
            self.version,
            name_offset if name else 0,
            len(name),
            self.cluster_bits,
            self.size_bytes,
            0,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        return (fixed + fields + area + name).ljust(self.cluster_size_bytes, b"\0")

    def _v3_fields(self) -> bytes:
        length = KNOWN_LENGTH_BYTES + len(self.unknown_fields)
        known = VERSION3_FIELDS.pack(
            self.incompatible, self.compatible, self.autoclear, self.refcount_order, length
        )
        return known + bytes([self.compression_type]).ljust(8, b"\0") + self.unknown_fields

    def for_writing(self) -> Header:
        """The header as it must stand in the file before anything else is written to the image.

        What nobody here keeps up to date is gone: unknown autoclear bits, and stale bitmaps. Those
        that are valid stay, and are to be marked as in use before the disk's content changes.
        Raises ``BlockdError`` where the image must not be written to.
        """
        if self.incompatible & Incompatible.CORRUPT:
            raise BlockdError("qcow2: Image is corrupt; cannot be opened read/write")
        return replace(
            self,
            autoclear=self.autoclear & AUTOCLEAR_MASK,
            extensions=replace(self.extensions, stale_bitmaps=False),
        )

    # -- what follows from the fields ----------------------------------------------------------

    @property
    def cluster_size_bytes(self) -> int:
        return 1 << self.cluster_bits

    def clusters_of(self, offset: int, length: int) -> range:
        """The file's clusters that these bytes lie in."""
        return range(offset >> self.cluster_bits, -(-(offset + length) >> self.cluster_bits))

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        """How many clusters one refcount block counts the references of."""
        return self.cluster_size_bytes * 8 >> self.refcount_order

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def subcluster_size_bytes(self) -> int:
        """What is allocated at a time: a cluster, or one of its 32 parts."""
        return self.cluster_size_bytes // (SUBCLUSTERS if self.extended_l2 else 1)

    @property
    def l2_entry_bytes(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size_bytes // self.l2_entry_bytes

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        return bool(self.autoclear & Autoclear.DATA_FILE_RAW)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible & Compatible.LAZY_REFCOUNTS)

    def l1_entries_for(self, size_bytes: int) -> int:
        """How many entries the L1 table of a disk of that size has at the least."""
        return -(-size_bytes // (self.cluster_size_bytes * self.l2_entries))
