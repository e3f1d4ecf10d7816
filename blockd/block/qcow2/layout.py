"""What a new image holds, and where: options to a plan, without touching anything.

Everything lies in one row, each table in one piece, whatever the options::

    header | refcount table | refcount blocks | L1 table | L2 tables | data

The last two are there only where the image is preallocated, and the data only where it has no
file of its own. Growing needs room for more refcounts soon, which the allocator finds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from blockd import limits
from blockd.block.qcow2.extensions import Extensions
from blockd.block.qcow2.features import Autoclear, Compatible, CompressionType, Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.image_options import ImageOptions, Preallocation
from blockd.errors import BlockdError
from blockd.extent import Extent

_ENTRY_BYTES = 8
#: What an entry points at is referenced once (specification, "Cluster mapping", bit 63).
_COPIED = 1 << 63
#: Bytes that are built at a time.
_PIECE_BYTES = limits.MIB


@dataclass(frozen=True, slots=True)
class Layout:
    """A new image: its header, and what lies where. All parts are whole clusters."""

    header: Header
    preallocation: Preallocation
    refcount_table: Extent
    refcount_blocks: Extent
    l1_table: Extent
    l2_tables: Extent
    #: Empty where the data has a file of its own.
    data: Extent

    @property
    def end(self) -> int:
        """The file's size, in bytes."""
        return self.data.end

    def tables(self) -> Iterator[tuple[int, bytes]]:
        """(Offset, bytes) of everything between the header and the data, in pieces."""
        cluster = self.header.cluster_size_bytes
        blocks = range(self.refcount_blocks.offset, self.refcount_blocks.end, cluster)
        yield from _entries(self.refcount_table, blocks)
        yield from _refcounts(self.refcount_blocks, self.header.refcount_bits, self.end // cluster)
        yield from _entries(self.l1_table, _copied(self.l2_tables, cluster))
        if self.l2_tables.length:
            # In a file of its own, data lies where the guest sees it.
            guest = Extent(0, _whole(self.header.size_bytes, cluster))
            clusters = _copied(guest if self.header.has_data_file else self.data, cluster)
            # The second half of an extended entry stays 0: no subcluster holds anything yet.
            yield from _entries(self.l2_tables, clusters, self.header.l2_entry_bytes)


def plan_image(options: ImageOptions) -> Layout:
    """Lay a new image out. Raises ``BlockdError`` where the options, or its size, forbid it."""
    options.check()
    header = _header(options)
    cluster = header.cluster_size_bytes
    if header.l1_size * _ENTRY_BYTES > limits.QCOW2_L1_TABLE_BYTES:
        raise BlockdError("Could not resize image: Failed to grow the L1 table: File too large")
    # The raw data file is as good as the image only where the tables say nothing else.
    forced = options.data_file_raw and options.preallocation is Preallocation.OFF
    preallocation = Preallocation.METADATA if forced else options.preallocation
    full = preallocation is not Preallocation.OFF
    l1_bytes = _whole(header.l1_size * _ENTRY_BYTES, cluster)
    l2_bytes = header.l1_size * cluster if full else 0
    in_image = full and not header.has_data_file
    data_bytes = _whole(options.size_bytes, cluster) if in_image else 0
    counted_bytes = cluster + l1_bytes + l2_bytes + data_bytes
    refcount_table, refcount_blocks = _refcount_extents(header, counted_bytes // cluster)
    l1_table = Extent(refcount_blocks.end, l1_bytes)
    l2_tables = Extent(l1_table.end, l2_bytes)
    header = replace(
        header,
        l1_table_offset=l1_table.offset if l1_bytes else 0,
        refcount_table_offset=refcount_table.offset,
        refcount_table_clusters=refcount_table.length // cluster,
    )
    data = Extent(l2_tables.end, data_bytes)
    return Layout(header, preallocation, refcount_table, refcount_blocks, l1_table, l2_tables, data)


def _header(options: ImageOptions) -> Header:
    """The header, as far as it does not depend on where things lie."""
    incompatible = Incompatible(0)
    if options.data_file is not None:
        incompatible |= Incompatible.DATA_FILE
    if options.compression_type is not CompressionType.ZLIB:
        incompatible |= Incompatible.COMPRESSION_TYPE
    if options.extended_l2:
        incompatible |= Incompatible.EXTENDED_L2
    header = Header(
        version=options.version,
        cluster_bits=options.cluster_size_bytes.bit_length() - 1,
        size_bytes=options.size_bytes,
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        incompatible=incompatible,
        compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=Autoclear.DATA_FILE_RAW if options.data_file_raw else 0,
        refcount_order=options.refcount_bits.bit_length() - 1,
        compression_type=options.compression_type,
        backing_file=options.backing_file,
        extensions=Extensions(options.backing_format, options.data_file),
    )
    return replace(header, l1_size=header.l1_entries_for(options.size_bytes))


def _refcount_extents(header: Header, clusters: int) -> tuple[Extent, Extent]:
    """The refcount table and blocks for that many clusters and for themselves.

    Each of their clusters needs a count too, so their number is a fixed point.
    """
    cluster = header.cluster_size_bytes
    table = blocks = 0
    while True:
        needed = -(-(clusters + table + blocks) // header.refcount_block_entries)
        needed_table = _whole(needed * _ENTRY_BYTES, cluster) // cluster
        if (needed, needed_table) == (blocks, table):
            break
        blocks, table = needed, needed_table
    if table * cluster > limits.QCOW2_REFCOUNT_TABLE_BYTES:
        raise BlockdError(
            "The image's reference count table would be too large; use larger clusters"
        )
    refcount_table = Extent(cluster, table * cluster)
    return refcount_table, Extent(refcount_table.end, blocks * cluster)


def _whole(length: int, cluster_size_bytes: int) -> int:
    return length + -length % cluster_size_bytes


def _copied(where: Extent, step: int) -> range:
    """Entries that point at each step of ``where``, the only ones to do so."""
    return range(where.offset | _COPIED, where.end | _COPIED, step)


def _entries(
    where: Extent, values: range, entry_bytes: int = _ENTRY_BYTES
) -> Iterator[tuple[int, bytes]]:
    """A table that starts with one entry for each value; the rest of it is zero."""
    per_piece = _PIECE_BYTES // entry_bytes
    padding = bytes(entry_bytes - _ENTRY_BYTES)
    for first in range(0, where.length // entry_bytes, per_piece):
        some = values[first : first + per_piece]
        packed = struct.pack(f">{len(some)}Q", *some)
        if padding:
            packed = b"".join(entry + padding for (entry,) in struct.iter_unpack("8s", packed))
        offset = where.offset + first * entry_bytes
        yield offset, packed.ljust(min(_PIECE_BYTES, where.end - offset), b"\0")


def _refcounts(where: Extent, bits: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Blocks of refcounts: ``count`` ones, then zeroes. Entries below a byte begin at bit 0."""
    one = (
        (1).to_bytes(bits // 8) if bits >= 8 else bytes([sum(1 << at for at in range(0, 8, bits))])
    )
    whole, rest_bits = divmod(count * bits, 8)
    last = bytes([one[-1] & ((1 << rest_bits) - 1)])
    for start in range(0, where.length, _PIECE_BYTES):
        length = min(_PIECE_BYTES, where.length - start)
        ones = one * (min(max(whole - start, 0), length) // len(one))
        if start <= whole < start + length:
            ones += last
        yield where.offset + start, ones.ljust(length, b"\0")
