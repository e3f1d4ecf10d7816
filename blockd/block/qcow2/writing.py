"""Writing what the guest writes: in place, or to clusters that nobody else uses."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from blockd import limits
from blockd.block.qcow2.entries import (
    COMPRESSED,
    COPIED,
    CorruptImageError,
    Span,
    find_in_place,
    find_span,
    subcluster_bits,
)
from blockd.block.qcow2.header import SUBCLUSTERS
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.mapping import Mapping
from blockd.block.qcow2.metadata import Metadata
from blockd.block.qcow2.reading import Reader
from blockd.block.qcow2.refcounts import Refcounts
from blockd.block.qcow2.requests import Busy
from blockd.block.qcow2.tables import Table
from blockd.errors import WouldBlock
from blockd.extent import Extent


@dataclass(frozen=True, slots=True)
class Place:
    """Where clusters go in the file. ``virgin``: there are zeroes already; ``new``: not in use."""

    host: int
    count: int
    virgin: bool
    new: bool


@dataclass(slots=True)
class Writer:
    """Writes through the mapping.

    A cluster with one reference is overwritten where it is. Any other write goes to new clusters,
    together with what it leaves of the old ones; only then, at one instant, the mapping changes.
    Two such writes to one cluster wait for each other.
    """

    mapping: Mapping
    refcounts: Refcounts
    metadata: Metadata
    reader: Reader
    data_file: HostFile
    #: Guest and host offsets are the same in an external data file, and nothing is counted.
    external: bool
    busy: Busy = field(default_factory=Busy)

    def write_nowait(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at once, or raise ``WouldBlock``."""
        host = self._find_cluster(offset, len(view))
        if host is not None:
            self.data_file.node.write_nowait(host, view)
            return
        geometry = self.mapping.geometry
        table = self.mapping.writable_nowait(offset >> geometry.reach_bits)
        if table is None:
            raise WouldBlock
        host, length = find_in_place(table.words, geometry, offset, len(view))
        if not length:
            self._write_new_nowait(table, offset, view)
            return
        if length < len(view) or not self._is_data(host, length):
            raise WouldBlock
        self.data_file.node.write_nowait(host, view)

    def _find_cluster(self, offset: int, length: int) -> int | None:
        mapping = self.mapping
        if not mapping.l1[offset >> mapping.geometry.reach_bits] & COPIED:
            return None
        host = mapping.find_cluster(offset, length, COPIED)
        return host if host is not None and self._is_data(host, length) else None

    def _write_new_nowait(self, table: Table, offset: int, view: memoryview) -> None:
        """Write ``view`` to new clusters, where around it are zeroes, or nothing is left."""
        geometry = self.mapping.geometry
        first, end = offset >> geometry.cluster_bits, offset + len(view)
        span = self.find_span(table, first, offset, len(view))
        filled = self._bounds(span, offset, end)
        if (
            self.external
            or span.host is not None
            or (first + span.count) << geometry.cluster_bits < end
            or self.busy.clip(first, first + span.count) < span.count
            or self.metadata.over_limit
        ):
            raise WouldBlock
        clusters = self.refcounts.allocate_nowait(span.count)
        if clusters is None:
            raise WouldBlock
        place = Place(
            clusters.first << geometry.cluster_bits, span.count, virgin=clusters.virgin, new=True
        )
        try:
            self._write_filled_nowait(place, filled, offset, view)
        except WouldBlock:
            self.refcounts.take_back(clusters)
            raise
        except OSError:
            self.refcounts.free(clusters.first, clusters.count)
            raise
        self.link(table, place, first, filled)

    def _write_filled_nowait(
        self, place: Place, filled: Extent, offset: int, view: memoryview
    ) -> None:
        end = offset + len(view)
        host = place.host + (offset & (self.mapping.geometry.cluster_bytes - 1))
        if host + len(view) > self.data_file.node.size_bytes or not (
            filled.length == len(view)
            or (
                place.virgin
                and self._was_zero_nowait(filled.offset, offset)
                and self._was_zero_nowait(end, filled.end)
            )
        ):
            raise WouldBlock
        self.data_file.node.write_nowait(host, view)

    def _was_zero_nowait(self, start: int, end: int) -> bool:
        end = min(end, self.metadata.size_bytes)
        return self.reader.reads_as_zeroes_nowait(start, end - start)

    async def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``. Raises ``OSError``."""
        geometry = self.mapping.geometry
        while view:
            index = offset >> geometry.reach_bits
            table = await self.mapping.load(index)
            done = 0
            if table is not None and self.mapping.l1[index] & COPIED:
                host, done = find_in_place(table.words, geometry, offset, len(view))
                if done:
                    self.check_data(host, done)
                    self.reader.file.debug_event("write_aio")
                    await self.data_file.write(host, view[:done])
            if not done:
                done = await self._write_elsewhere(table, offset, view)
            offset += done
            view = view[done:]

    # -- what may be written to --------------------------------------------------------------

    def _is_data(self, host: int, length: int) -> bool:
        """Whether the range lies inside the file, and holds no metadata."""
        bits = self.mapping.geometry.cluster_bits
        first, last = host >> bits, (host + length - 1) >> bits
        metadata = self.refcounts.metadata
        if first == last:
            if first in metadata:
                return self.external
        elif metadata.range_cardinality(first, last + 1):
            return self.external
        return host + length <= self.data_file.node.size_bytes

    def check_data(self, host: int, length: int) -> None:
        """Raise ``CorruptImageError`` where what an entry names can't be a guest's data."""
        if self.external or self._is_data(host, length):
            return
        # The file may end within its last cluster.
        inside = self.data_file.node.size_bytes - host
        if not 0 < inside < self.mapping.geometry.cluster_bytes or not self._is_data(host, inside):
            raise CorruptImageError(f"data offset {host:#x} is not that of a data cluster")

    # -- to another place --------------------------------------------------------------------

    async def _write_elsewhere(self, table: Table | None, offset: int, view: memoryview) -> int:
        """Write the beginning of ``view`` to where it can be written; how much that was.

        0: the mapping changed meanwhile.
        """
        geometry = self.mapping.geometry
        first = offset >> geometry.cluster_bits
        most = max(limits.QCOW2_ALLOCATION_BYTES, geometry.cluster_bytes)
        length = min(len(view), most - (offset & (geometry.cluster_bytes - 1)))
        span = self.find_span(table, first, offset, length)
        count = self.busy.clip(first, first + span.count)
        if not count:
            await self.busy.wait(first, first + 1)
            return 0
        with self.busy.hold(first, first + count):
            done = await self._write_span(replace(span, count=count), offset, view)
        if self.metadata.over_limit:
            await self.metadata.flush()
        return done

    def find_span(self, table: Table | None, first: int, offset: int, length: int) -> Span:
        """The clusters from ``first`` on, which a write must give a place alike."""
        geometry = self.mapping.geometry
        index = first & (geometry.l2_entries - 1)
        end = index + ((offset + length - 1) >> geometry.cluster_bits) + 1 - first
        end = min(end, geometry.l2_entries)
        if table is None:
            return Span(end - index, None, whole_first=False, whole_last=False)
        shared = not self.mapping.l1[offset >> geometry.reach_bits] & COPIED
        return find_span(table.words, geometry, index, end, shared=shared)

    async def _write_span(self, span: Span, offset: int, view: memoryview) -> int:
        geometry = self.mapping.geometry
        first = offset >> geometry.cluster_bits
        place = await self.find_place(span, first)
        with self.unlinked(place):
            end = min(offset + len(view), (first + place.count) << geometry.cluster_bits)
            filled = self._bounds(span, offset, end)
            await self._write_filled(place, filled, offset, view[: end - offset])
            table = await self.mapping.writable(offset >> geometry.reach_bits)
        self.link(table, place, first, filled)
        return end - offset

    @contextmanager
    def unlinked(self, place: Place) -> Iterator[None]:
        """The body makes the place ready to be linked; where it fails, the place is given up."""
        first = place.host >> self.mapping.geometry.cluster_bits
        try:
            yield
        except OSError:
            if place.new:
                self.refcounts.free(first, place.count)
            raise
        except BaseException:
            # A cancelled write may still be on its way to the clusters.
            if place.new:
                self.refcounts.abandon(first, place.count)
            raise

    async def find_place(self, span: Span, first: int) -> Place:
        bits = self.mapping.geometry.cluster_bits
        if self.external:
            return Place(first << bits, span.count, virgin=False, new=False)
        if span.host is not None:
            self.check_data(span.host, span.count << bits)
            return Place(span.host, span.count, virgin=False, new=False)
        clusters = await self.refcounts.allocate(span.count)
        return Place(clusters.first << bits, clusters.count, virgin=clusters.virgin, new=True)

    def _bounds(self, span: Span, offset: int, end: int) -> Extent:
        """The range that is valid once ``offset`` up to ``end`` is written: whole units of it."""
        geometry = self.mapping.geometry
        unit_first = geometry.cluster_bytes if span.whole_first else geometry.unit_bytes
        unit_last = geometry.cluster_bytes if span.whole_last else geometry.unit_bytes
        start = offset // unit_first * unit_first
        return Extent(start, -(-end // unit_last) * unit_last - start)

    async def _write_filled(
        self, place: Place, filled: Extent, offset: int, view: memoryview
    ) -> None:
        """Write ``view``, and around it what the guest saw there before."""
        end = offset + len(view)
        host = place.host + (filled.offset & (self.mapping.geometry.cluster_bytes - 1))
        file = self.reader.file
        if filled.length == len(view) or (
            place.virgin
            and await self._was_zero(filled.offset, offset)
            and await self._was_zero(end, filled.end)
        ):
            file.debug_event("write_aio")
            await self.data_file.write(host + offset - filled.offset, view)
            return
        file.debug_event("cow_read")
        data = memoryview(bytearray(filled.length))
        await self._read_old(filled.offset, data[: offset - filled.offset])
        data[offset - filled.offset : end - filled.offset] = view
        await self._read_old(end, data[end - filled.offset :])
        if self.external:
            data = data[: self.metadata.size_bytes - filled.offset]
        # All in one, as QEMU tells of it.
        file.debug_event("write_aio")
        file.debug_event("cow_write")
        await self.data_file.write(host, data)

    async def _was_zero(self, start: int, end: int) -> bool:
        end = min(end, self.metadata.size_bytes)
        return start >= end or await self.reader.reads_as_zeroes(start, end - start)

    async def _read_old(self, offset: int, view: memoryview) -> None:
        inside = max(0, min(len(view), self.metadata.size_bytes - offset))
        await self.reader.read(offset, view[:inside])

    def link(self, table: Table, place: Place, first: int, filled: Extent) -> None:
        """Let the entries name the clusters that were written, and free what they named before."""
        geometry = self.mapping.geometry
        index = first & (geometry.l2_entries - 1)
        step = geometry.entry_words
        if place.new:
            for entry in table.words[index * step : (index + place.count) * step : step]:
                if entry:
                    self.forget(entry)
        if geometry.extended:
            self._link_extended(table.words, place, first, filled)
        else:
            entry = place.host | COPIED
            end = entry + (place.count << geometry.cluster_bits)
            entries = array("Q", range(entry, end, geometry.cluster_bytes))
            table.words[index : index + place.count] = entries
        self.mapping.mark(first // geometry.l2_entries, table, index, index + place.count)

    def _link_extended(self, words: array[int], place: Place, first: int, filled: Extent) -> None:
        geometry = self.mapping.geometry
        index = first & (geometry.l2_entries - 1)
        for at in range(place.count):
            start = (first + at) << geometry.cluster_bits
            host = place.host + (at << geometry.cluster_bits)
            bits = subcluster_bits(geometry, filled.offset - start, filled.end - start)
            entry, bitmap = words[2 * (index + at) : 2 * (index + at) + 2]
            kept = 0 if entry & COMPRESSED else bitmap
            words[2 * (index + at)] = host | COPIED
            words[2 * (index + at) + 1] = (kept | bits) & ~(bits << SUBCLUSTERS)

    def link_compressed(self, table: Table, cluster: int, entry: int) -> None:
        """Let a guest cluster's entry name its compressed data, which was written."""
        geometry = self.mapping.geometry
        index = cluster & (geometry.l2_entries - 1)
        at = index * geometry.entry_words
        self.forget(table.words[at])
        table.words[at] = entry
        if geometry.extended:
            table.words[at + 1] = 0
        self.mapping.mark(cluster // geometry.l2_entries, table, index, index + 1)

    def forget(self, entry: int) -> None:
        """Nothing refers any more, from this entry, to the cluster or clusters that it names."""
        if not self.external:
            clusters = self.mapping.geometry.clusters(entry)
            if clusters:
                self.refcounts.free(clusters.start, len(clusters))
