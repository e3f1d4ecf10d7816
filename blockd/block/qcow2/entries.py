"""What L2 entries say (specification, "Cluster mapping" and "Extended L2 Entries").

A table's words are held as the numbers they are; an extended entry takes two of them.
"""

from __future__ import annotations

import errno
from array import array
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from blockd.block.qcow2.header import SUBCLUSTERS, Header

#: The refcount is exactly one: the table or cluster may be changed in place.
COPIED = 1 << 63
COMPRESSED = 1 << 62
#: The cluster reads as zeroes, whatever the offset says; only in entries that are not extended.
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
#: All subclusters: in the lower half of a bitmap they are allocated, in the upper half zero.
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1
_SECTOR_BYTES = 512


class CorruptImageError(OSError):
    """The image's metadata can't be right. Nothing was written by it.

    ``fatal``: whatever else is done with the image may do more damage.
    """

    def __init__(self, reason: str, *, fatal: bool = True) -> None:
        super().__init__(errno.EIO, f"qcow2 image is corrupt: {reason}")
        self.reason = reason
        self.fatal = fatal


class Kind(Enum):
    """Where a guest's bytes are."""

    #: In the backing file, or nowhere.
    UNALLOCATED = auto()
    ZERO = auto()
    DATA = auto()
    COMPRESSED = auto()


class Run(NamedTuple):
    """Bytes that follow each other for the guest and, where they are data, in the file.

    ``host``: the offset of the first in the file; for a compressed cluster its whole entry.
    """

    kind: Kind
    length: int
    host: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that follow from a header, as the mapping needs them."""

    cluster_bits: int
    cluster_bytes: int
    #: Entries of an L2 table, and words of an entry.
    l2_entries: int
    entry_words: int
    #: An L2 table describes ``1 << reach_bits`` bytes.
    reach_bits: int
    #: What has a state of its own: a cluster, or a subcluster.
    unit_bytes: int
    extended: bool
    #: What no entry of a plain data cluster has but ``COPIED``.
    not_data_mask: int
    #: Whether an offset of 0 can be one (an external data file).
    zero_offset_valid: bool

    @classmethod
    def of(cls, header: Header) -> Geometry:
        cluster_bytes = header.cluster_size_bytes
        return cls(
            cluster_bits=header.cluster_bits,
            cluster_bytes=cluster_bytes,
            l2_entries=header.l2_entries,
            entry_words=header.l2_entry_bytes // 8,
            reach_bits=header.cluster_bits + header.l2_entries.bit_length() - 1,
            unit_bytes=header.subcluster_size_bytes,
            extended=header.extended_l2,
            not_data_mask=~(COPIED | (OFFSET_MASK & -cluster_bytes)) & (2**64 - 1),
            zero_offset_valid=header.has_data_file,
        )

    def is_unallocated(self, entry: int) -> bool:
        """Whether the entry names neither a cluster nor zeroes."""
        return not entry & ~COPIED and not (self.zero_offset_valid and entry)

    def host_offset(self, entry: int) -> int | None:
        """The cluster that a standard entry names, if any. Raises ``CorruptImageError``."""
        if self.is_unallocated(entry & ~ZERO):
            return None
        offset = entry & OFFSET_MASK
        if offset & (self.cluster_bytes - 1):
            raise CorruptImageError(f"cluster offset {offset:#x} is not aligned")
        return offset

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """Where a compressed cluster's bytes lie: offset and length, up to a sector's end."""
        offset_bits = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << offset_bits) - 1) & (1 << 56) - 1
        sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1
        return offset, sectors * _SECTOR_BYTES - offset % _SECTOR_BYTES

    def clusters(self, entry: int) -> range:
        """The host clusters that an entry refers to. Raises ``CorruptImageError``."""
        if entry & COMPRESSED:
            offset, length = self.compressed_extent(entry)
            last = (offset + length - 1) >> self.cluster_bits
            return range(offset >> self.cluster_bits, last + 1)
        host = self.host_offset(entry)
        if host is None:
            return range(0)
        first = host >> self.cluster_bits
        return range(first, first + 1)

    @property
    def compressed_limit(self) -> int:
        """No byte of a compressed cluster lies at this offset or beyond."""
        return 1 << min(62 - (self.cluster_bits - 8), 56)

    def compressed_entry(self, offset: int, length: int) -> int:
        """The entry of a compressed cluster."""
        offset_bits = 62 - (self.cluster_bits - 8)
        sectors = (offset + length - 1) // _SECTOR_BYTES - offset // _SECTOR_BYTES
        return COMPRESSED | (sectors << offset_bits) | offset


def find_run(words: array[int], geometry: Geometry, offset: int, length: int) -> Run:
    """How the first of ``length`` bytes from ``offset`` on is mapped, and how many after it alike.

    It ends at the latest where the table does. Raises ``CorruptImageError``.
    """
    index = (offset >> geometry.cluster_bits) & (geometry.l2_entries - 1)
    inside = offset & (geometry.cluster_bytes - 1)
    end = index + ((inside + length - 1) >> geometry.cluster_bits) + 1
    end = min(end, geometry.l2_entries)
    find = _find_extended if geometry.extended else _find_standard
    run = find(words, geometry, index, end, inside)
    return run if run.length <= length else Run(run.kind, length, run.host)


def _find_standard(words: array[int], geometry: Geometry, index: int, end: int, inside: int) -> Run:
    entry = words[index]
    at = index + 1
    if not geometry.is_unallocated(entry) and not entry & geometry.not_data_mask:
        step = geometry.cluster_bytes
        wanted = (entry | COPIED) + step
        while at < end and words[at] | COPIED == wanted:
            wanted += step
            at += 1
        host = (entry & OFFSET_MASK) + inside
        return Run(Kind.DATA, ((at - index) << geometry.cluster_bits) - inside, host)
    kind = _standard_kind(geometry, entry)
    if kind is Kind.COMPRESSED:
        return Run(kind, geometry.cluster_bytes - inside, entry)
    while at < end and (words[at] == entry or _is_alike(geometry, words[at], kind)):
        at += 1
    return Run(kind, ((at - index) << geometry.cluster_bits) - inside, 0)


def _is_alike(geometry: Geometry, entry: int, kind: Kind) -> bool:
    if kind is Kind.UNALLOCATED:
        return geometry.is_unallocated(entry)
    return bool(entry & ZERO) and not entry & COMPRESSED


def _standard_kind(geometry: Geometry, entry: int) -> Kind:
    """The kind of an entry that is not plain data. Raises ``CorruptImageError``."""
    if entry & COMPRESSED:
        return Kind.COMPRESSED
    if geometry.is_unallocated(entry):
        return Kind.UNALLOCATED
    if not entry & ZERO:
        raise CorruptImageError(f"L2 entry {entry:#x} is not valid")
    return Kind.ZERO


def find_segment(entry: int, bitmap: int, subcluster: int) -> tuple[Kind, int]:
    """The kind of a subcluster and how many are alike from it on, by an extended entry."""
    if entry & COMPRESSED:
        return Kind.COMPRESSED, SUBCLUSTERS - subcluster
    allocated = (bitmap & ALL_SUBCLUSTERS) >> subcluster
    zero = bitmap >> SUBCLUSTERS >> subcluster
    if allocated & zero:
        raise CorruptImageError(f"subcluster bitmap {bitmap:#x} is not valid")
    if allocated & 1:
        return Kind.DATA, _trailing_ones(allocated)
    if zero & 1:
        return Kind.ZERO, _trailing_ones(zero)
    other = allocated | zero
    alike = (other & -other).bit_length() - 1 if other else SUBCLUSTERS - subcluster
    return Kind.UNALLOCATED, alike


def _trailing_ones(bits: int) -> int:
    return (~bits & (bits + 1)).bit_length() - 1


def _find_extended(words: array[int], geometry: Geometry, index: int, end: int, inside: int) -> Run:
    unit = geometry.unit_bytes
    subcluster = inside // unit
    entry = words[2 * index]
    kind, count = find_segment(entry, words[2 * index + 1], subcluster)
    if kind is Kind.COMPRESSED:
        return Run(kind, geometry.cluster_bytes - inside, entry)
    host = _extended_offset(geometry, entry) if kind is Kind.DATA else 0
    units = count
    at = index + 1
    while at < end and subcluster + units == (at - index) * SUBCLUSTERS:
        entry = words[2 * at]
        more, count = find_segment(entry, words[2 * at + 1], 0)
        if more is not kind:
            break
        wanted = host + (at - index) * geometry.cluster_bytes
        if kind is Kind.DATA and _extended_offset(geometry, entry) != wanted:
            break
        units += count
        at += 1
    start = host + inside if kind is Kind.DATA else 0
    return Run(kind, units * unit - inside % unit, start)


def _extended_offset(geometry: Geometry, entry: int) -> int:
    offset = geometry.host_offset(entry)
    if offset is None or entry & ZERO:
        raise CorruptImageError(f"L2 entry {entry:#x} is not valid")
    return offset


# -- writing ---------------------------------------------------------------------------------


def find_in_place(
    words: array[int], geometry: Geometry, offset: int, length: int
) -> tuple[int, int]:
    """The host offset of bytes that may be overwritten where they are, and how many do.

    The number is 0 where the first of them may not. Raises ``CorruptImageError``.
    """
    inside = offset & (geometry.cluster_bytes - 1)
    index = (offset >> geometry.cluster_bits) & (geometry.l2_entries - 1)
    entry = words[index * geometry.entry_words]
    if not entry & COPIED or entry & COMPRESSED:
        return 0, 0
    if geometry.extended:
        # One cluster at a time: each has a flag of its own.
        run = find_run(words, geometry, offset, min(length, geometry.cluster_bytes - inside))
        return (run.host, run.length) if run.kind is Kind.DATA else (0, 0)
    if entry & geometry.not_data_mask:
        geometry.host_offset(entry)
        return 0, 0
    end = min(index + ((inside + length - 1) >> geometry.cluster_bits) + 1, geometry.l2_entries)
    at = index + 1
    wanted = entry + geometry.cluster_bytes
    while at < end and words[at] == wanted:
        wanted += geometry.cluster_bytes
        at += 1
    if not entry & OFFSET_MASK and not geometry.zero_offset_valid:
        raise CorruptImageError("a data cluster lies at the image's header")
    found = ((at - index) << geometry.cluster_bits) - inside
    return (entry & OFFSET_MASK) + inside, min(found, length)


@dataclass(frozen=True, slots=True)
class Span:
    """Guest clusters that a write must give a place, all in the same way.

    ``host``: they have one already, which is theirs alone but holds nothing that is valid; None:
    they need a new one. ``whole``: what the write leaves of the first, or of the last, cluster
    is copied to its borders, and not only to those of its first and last unit.
    """

    count: int
    host: int | None
    whole_first: bool
    whole_last: bool


def find_span(words: array[int], geometry: Geometry, index: int, end: int, *, shared: bool) -> Span:
    """The clusters from entry ``index`` on, before ``end``, that must be given a place alike.

    The first one can't be written in place. ``shared``: the table isn't the image's alone, and
    so none of the clusters is. Raises ``CorruptImageError``.
    """
    step = geometry.entry_words
    host = None if shared else own_host(geometry, words[index * step])
    at = index + 1
    while at < end:
        entry = words[at * step]
        wanted = None if host is None else host + (at - index) * geometry.cluster_bytes
        if (None if shared else own_host(geometry, entry)) != wanted:
            break
        if wanted is not None and not geometry.extended and not entry & ZERO:
            break
        at += 1
    whole = (_needs_copy(geometry, words[place * step]) for place in (index, at - 1))
    return Span(at - index, host, *whole)


def own_host(geometry: Geometry, entry: int) -> int | None:
    """The cluster that an entry has for itself alone."""
    if not entry & COPIED or entry & COMPRESSED:
        return None
    return geometry.host_offset(entry)


def _needs_copy(geometry: Geometry, entry: int) -> bool:
    """Whether an extended entry's cluster holds data that a new one must take over."""
    if not geometry.extended or own_host(geometry, entry) is not None:
        return False
    return bool(entry & COMPRESSED) or geometry.host_offset(entry) is not None


def subcluster_bits(geometry: Geometry, start: int, end: int) -> int:
    """The bitmap of the subclusters that hold bytes ``start`` up to ``end`` of a cluster."""
    first = max(start, 0) // geometry.unit_bytes
    last = min(end, geometry.cluster_bytes) // geometry.unit_bytes
    return (1 << last) - (1 << first)
