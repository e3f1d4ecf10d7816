"""An open image: its parts, and how they are put together."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from pyroaring import BitMap64

from blockd.block.node import Node
from blockd.block.qcow2.bulk import BulkWriter
from blockd.block.qcow2.entries import OFFSET_MASK
from blockd.block.qcow2.features import Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.mapping import Mapping
from blockd.block.qcow2.metadata import Metadata
from blockd.block.qcow2.packing import Packer
from blockd.block.qcow2.parsing import HEADER_BYTES, parse_header
from blockd.block.qcow2.reading import Reader
from blockd.block.qcow2.refcounts import Refcounts
from blockd.block.qcow2.repair import repair
from blockd.block.qcow2.requests import Requests
from blockd.block.qcow2.resizing import Resizer
from blockd.block.qcow2.words import decode_words
from blockd.block.qcow2.writing import Writer
from blockd.block.qcow2.zeroing import Zeroer
from blockd.errors import BlockdError


@dataclass(frozen=True, slots=True)
class Changes:
    """What an image that may be changed has besides."""

    metadata: Metadata
    writer: Writer
    zeroer: Zeroer
    packer: Packer
    bulk: BulkWriter
    resizer: Resizer


@dataclass(frozen=True, slots=True)
class Image:
    """``header`` is that which the image was opened with."""

    header: Header
    file: HostFile
    data_file: HostFile
    reader: Reader
    requests: Requests
    #: None where the image is only read.
    changes: Changes | None


async def read_header(file: Node) -> Header:
    """The header of the image in ``file``. Raises ``BlockdError`` where it is none, ``OSError``."""
    length = min(HEADER_BYTES, file.size_bytes)
    data = await HostFile(file).read_bytes(0, length)
    return parse_header(bytes(data), file.size_bytes)


async def open_image(
    file: Node,
    header: Header,
    *,
    backing: Node | None = None,
    data_file: Node | None = None,
    read_only: bool = False,
    discard_freed: bool = False,
) -> Image:
    """Open the image in ``file``, whose header was read before.

    ``discard_freed``: clusters that become free are discarded in ``file``. An image that was not
    closed in order is repaired, unless it is only read. Raises ``BlockdError``, ``OSError``.
    """
    host = HostFile(file)
    data = host if data_file is None else HostFile(data_file, growth_bytes=1)
    if not read_only:
        file.driver.hold_to_resize()
        header = await _prepare(host, header)
    l1 = decode_words(await host.read_bytes(header.l1_table_offset, header.l1_size * 8))
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    host.debug_event("reftable_load")
    table = decode_words(await host.read_bytes(header.refcount_table_offset, table_bytes))
    metadata = BitMap64() if read_only else _find_metadata(header, l1, table)
    refcounts = Refcounts(host, header, table, metadata)
    mapping = Mapping(host, header, l1, refcounts)
    reader = Reader(mapping, host, data, backing, header.compression_type)
    requests = Requests()
    changes = None
    if not read_only:
        written = Metadata(
            header=header,
            file=host,
            data_file=data,
            mapping=mapping,
            refcounts=refcounts,
            requests=requests,
            discard_freed=discard_freed,
        )
        changes = _make_changes(reader, refcounts, written)
    return Image(header, host, data, reader, requests, changes)


def _make_changes(reader: Reader, refcounts: Refcounts, metadata: Metadata) -> Changes:
    header = metadata.header
    external = reader.data_file is not reader.file
    writer = Writer(reader.mapping, refcounts, metadata, reader, reader.data_file, external)
    zeroer = Zeroer(writer, reader, flags=header.version >= 3, raw_data=header.data_file_raw)
    packer = Packer(writer, reader.file, header.compression_type)
    return Changes(metadata, writer, zeroer, packer, BulkWriter(writer), Resizer(writer, zeroer))


async def _prepare(file: HostFile, header: Header) -> Header:
    """Let the header say what it must before anything is written, and repair what is dirty."""
    fit = header.for_writing()
    if fit.incompatible & Incompatible.DIRTY:
        await repair(file, fit)
        fit = replace(fit, incompatible=fit.incompatible & ~Incompatible.DIRTY)
    if fit != header:
        await file.write(0, memoryview(fit.build()))
        await file.node.flush()
    return fit


def _find_metadata(header: Header, l1: array[int], refcount_table: array[int]) -> BitMap64:
    """The clusters of all tables. Raises ``BlockdError`` where two of them overlap."""
    bits = header.cluster_bits
    found = BitMap64([0])
    count = 1
    for offset, length in (
        (header.l1_table_offset, len(l1) * 8),
        (header.refcount_table_offset, len(refcount_table) * 8),
        (header.snapshots_offset, header.nb_snapshots and 1),
    ):
        clusters = -(-length >> bits)
        found.add_range(offset >> bits, (offset >> bits) + clusters)
        count += clusters
    for table in (l1, refcount_table):
        offsets = [(word & OFFSET_MASK) >> bits for word in table if word & OFFSET_MASK]
        found.update(offsets)
        count += len(offsets)
    if len(found) != count:
        raise BlockdError(
            "qcow2: tables of the image overlap each other; 'qemu-img check -r all' may repair it"
        )
    return found
