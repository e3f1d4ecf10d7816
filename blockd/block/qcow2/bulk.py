"""Long writes by a descriptor: a worker thread puts them where clusters were made ready for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockd.block.descriptor import WriteBy, moved
from blockd.block.qcow2.entries import Span, find_in_place
from blockd.block.qcow2.tables import Table
from blockd.block.qcow2.writing import Writer
from blockd.extent import Extent


@dataclass(slots=True)
class BulkWriter:
    """Lets others write whole clusters.

    They may have let go of what they wrote. So all that can fail is done before the thread
    begins: what it wrote is the guest's content from then on, without another await.
    """

    writer: Writer

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        """As ``Driver.write_by``; parts of clusters are left out."""
        writer = self.writer
        end = offset + length
        while offset < end:
            if writer.metadata.over_limit:
                await writer.metadata.flush()
            stop, written = await self._write_part(offset, end, call)
            offset = written
            if written < stop:
                break
        return offset

    async def _write_part(self, offset: int, end: int, call: WriteBy) -> tuple[int, int]:
        """Write what lies together: up to where it could be, and was, written."""
        writer = self.writer
        geometry = writer.mapping.geometry
        index = offset >> geometry.reach_bits
        table = await writer.mapping.writable(index)
        host, done = find_in_place(table.words, geometry, offset, end - offset)
        if done:
            writer.check_data(host, done)
            return offset + done, await self._call(host, offset, offset + done, call)
        first = offset >> geometry.cluster_bits
        if offset & (geometry.cluster_bytes - 1):
            return end, offset
        span = writer.find_span(table, first, offset, end - offset)
        count = writer.busy.clip(first, first + span.count)
        if not count:
            await writer.busy.wait(first, first + 1)
            return offset, offset
        with writer.busy.hold(first, first + count), writer.mapping.tables.pinned(index):
            return await self._write_span(table, replace(span, count=count), offset, end, call)

    async def _write_span(
        self, table: Table, span: Span, offset: int, end: int, call: WriteBy
    ) -> tuple[int, int]:
        writer = self.writer
        bits = writer.mapping.geometry.cluster_bits
        first = offset >> bits
        self._check_entries(table, first, span.count)
        place = await writer.find_place(span, first)
        with writer.unlinked(place):
            stop = min(end, (first + place.count) << bits)
            if stop < writer.metadata.size_bytes or not place.virgin:
                # In the rest of a cluster there would have to be what the guest sees there.
                stop = stop >> bits << bits
            written = offset
            if offset < stop:
                written = await self._call(place.host, offset, stop, call)
        if written < stop:
            written = written >> bits << bits
        kept = -(-written >> bits) - first
        if kept:
            writer.link(table, replace(place, count=kept), first, Extent(offset, kept << bits))
        if place.new and kept < place.count:
            writer.refcounts.give_back((place.host >> bits) + kept, place.count - kept)
        return (stop if offset < stop else end), written

    def _check_entries(self, table: Table, first: int, count: int) -> None:
        """Raise ``CorruptImageError`` now for what could not be freed later."""
        geometry = self.writer.mapping.geometry
        index = first & (geometry.l2_entries - 1)
        step = geometry.entry_words
        for entry in table.words[index * step : (index + count) * step : step]:
            if entry:
                geometry.clusters(entry)

    async def _call(self, host: int, offset: int, end: int, call: WriteBy) -> int:
        """Have it write from ``offset`` up to ``end``, which lies at ``host`` in the file."""
        file = self.writer.data_file
        shift = host - offset
        await file.make_room(end + shift)
        written = await file.node.write_by(host, end - offset, moved(call, shift))
        return written - shift
