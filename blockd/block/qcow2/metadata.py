"""Writing the metadata back, in the order that keeps the image sound at any point."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import trio

from blockd import limits
from blockd.block.qcow2.features import Incompatible
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.mapping import Mapping
from blockd.block.qcow2.refcounts import Refcounts
from blockd.block.qcow2.requests import Requests
from blockd.block.qcow2.tables import Change
from blockd.block.qcow2.words import encode_words

_WORD = struct.Struct(">Q")


@dataclass(slots=True)
class _Taken:
    """What is to be written, as it was at one instant."""

    blocks: Sequence[Change]
    refcount_table: _TopTable
    l2: Sequence[Change]
    l1: _TopTable
    size_bytes: int
    freed: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _TopTable:
    """The refcount table or the L1 table: its changed entries, or all where it moved."""

    offset: int
    entries: dict[int, int]
    moved: array[int] | None

    @property
    def changed(self) -> bool:
        return bool(self.entries) or self.moved is not None


@dataclass(frozen=True, slots=True)
class _Freed:
    """Clusters that nothing in the file refers to any more, but maybe a request in ``epoch``."""

    epoch: int
    clusters: list[tuple[int, int]]


class Metadata:
    """All metadata of one image that is open for writing, and when it reaches the file.

    It is changed in memory only, at the instant when the data that it speaks of is written. Every
    write-back takes what changed at one instant and brings it to the file in this order, with a
    barrier (all written so far is on stable storage) at each ``|``:

        guest data, refcount blocks | refcount table | L2 tables | L1 table | header, if
        tables moved | only then lower the counts of freed clusters, which makes them free

    So whatever the file refers to is there and counted; kill -9 or a power cut at any point
    leaves clusters that are counted and not used, and nothing worse. To find those again, the
    dirty bit stands in the file (of version 3) before the first change does.
    """

    def __init__(
        self,
        *,
        header: Header,
        file: HostFile,
        data_file: HostFile,
        mapping: Mapping,
        refcounts: Refcounts,
        requests: Requests,
        discard_freed: bool,
    ) -> None:
        """``header`` is what stands in the file."""
        self.header = header
        #: Whether the file may have another one, because writing that failed or was cancelled.
        self._header_in_doubt = False
        self.size_bytes = header.size_bytes
        self._file = file
        self._data_file = data_file
        self._mapping = mapping
        self._refcounts = refcounts
        self._requests = requests
        self._discard_freed = discard_freed
        self._dirty_limit = max(
            int(limits.QCOW2_L2_CACHE_BYTES * limits.QCOW2_DIRTY_SHARE / header.cluster_size_bytes),
            limits.QCOW2_CACHE_TABLES_MIN // 2,
        )
        #: Whether something left clusters in use that nothing refers to, nobody knows which.
        self.leaks = False
        self._waiting: list[_Freed] = []
        #: Whether the file may have another header than ``header``.
        self._header_in_doubt = False
        self._one = trio.Lock()
        self._begun = 0
        self._done = 0

    @property
    def over_limit(self) -> bool:
        """Whether so much has changed that it should be written back."""
        return (
            self._mapping.tables.dirty_count + self._refcounts.blocks.dirty_count
            > self._dirty_limit
            or self._refcounts.freed_count > limits.QCOW2_FREED_RUNS
        )

    async def flush(self) -> None:
        """Return once all that was written before is on stable storage. Raises ``OSError``.

        Those who wait while one is under way share the next.
        """
        wanted = self._begun + 1
        async with self._one:
            if self._done < wanted:
                self._begun += 1
                number = self._begun
                await self._write_back()
                self._done = number

    async def _write_back(self) -> None:
        if self._changed:
            await self._mark_in_use()
        taken = self._take()
        try:
            await self._put(taken)
        except BaseException:
            self._undo(taken)
            raise
        self._mapping.tables.written()
        self._refcounts.blocks.written()
        if taken.freed:
            self._waiting.append(_Freed(self._requests.next_epoch(), taken.freed))
        await self._release()

    @property
    def _changed(self) -> bool:
        return bool(
            self._mapping.tables.dirty_count
            or self._mapping.dirty_entries
            or self._mapping.l1_moved
            or self._refcounts.blocks.dirty_count
            or self.size_bytes != self.header.size_bytes
        )

    def _take(self) -> _Taken:
        mapping, refcounts = self._mapping, self._refcounts
        taken = _Taken(
            blocks=refcounts.blocks.take_changes(),
            refcount_table=_TopTable(
                refcounts.table_offset,
                {at: refcounts.table[at] for at in refcounts.dirty_entries},
                refcounts.table[:] if refcounts.table_moved else None,
            ),
            l2=mapping.tables.take_changes(),
            l1=_TopTable(
                mapping.l1_offset,
                {at: mapping.l1[at] for at in mapping.dirty_entries},
                mapping.l1[:] if mapping.l1_moved else None,
            ),
            size_bytes=self.size_bytes,
            freed=join_runs(refcounts.take_freed()),
        )
        refcounts.dirty_entries.clear()
        mapping.dirty_entries.clear()
        refcounts.table_moved = mapping.l1_moved = False
        return taken

    def _undo(self, taken: _Taken) -> None:
        """All that was taken counts as changed again, for what reached the file is not known."""
        mapping, refcounts = self._mapping, self._refcounts
        mapping.tables.not_written()
        refcounts.blocks.not_written()
        refcounts.dirty_entries |= taken.refcount_table.entries.keys()
        refcounts.table_moved |= taken.refcount_table.moved is not None
        mapping.dirty_entries |= taken.l1.entries.keys()
        mapping.l1_moved |= taken.l1.moved is not None
        for first, count in taken.freed:
            refcounts.free(first, count)

    async def _put(self, taken: _Taken) -> None:
        await self._write(taken.blocks, "refblock_update_part")
        if taken.refcount_table.changed:
            await self._file.node.flush()
            await self._put_refcount_table(taken.refcount_table)
        await self._barrier()
        await self._write(taken.l2, "l2_update")
        if taken.l1.changed:
            await self._file.node.flush()
            await self._put_l1_table(taken.l1)
        if taken.l2 or taken.l1.changed:
            await self._file.node.flush()
        if taken.size_bytes != self.header.size_bytes or self._header_in_doubt:
            await self.put_header(replace(self.header, size_bytes=taken.size_bytes))

    async def _put_refcount_table(self, table: _TopTable) -> None:
        moved = table.moved is not None
        event = "refblock_alloc_write_table" if moved else "refblock_alloc_hookup"
        await self._write(_changed_parts(table), event)
        if table.moved is None:
            return
        await self._file.node.flush()
        self._file.debug_event("refblock_alloc_switch_table")
        clusters = len(table.moved) * 8 >> self.header.cluster_bits
        header = replace(self.header, refcount_table_offset=table.offset)
        await self.put_header(replace(header, refcount_table_clusters=clusters))

    async def _put_l1_table(self, table: _TopTable) -> None:
        event = "l1_update" if table.moved is None else "l1_grow_write_table"
        await self._write(_changed_parts(table), event)
        if table.moved is None:
            return
        await self._file.node.flush()
        self._file.debug_event("l1_grow_activate_table")
        header = replace(self.header, l1_table_offset=table.offset, l1_size=len(table.moved))
        await self.put_header(header)

    async def _write(self, changes: Iterable[Change], event: str) -> None:
        for change in changes:
            self._file.debug_event(event)
            await self._file.write(change.offset, memoryview(change.data))

    async def _barrier(self) -> None:
        if self._data_file is not self._file:
            await self._data_file.node.flush()
        await self._file.node.flush()

    async def put_header(self, header: Header) -> None:
        """Bring another header to stable storage; it lies in the file's first cluster."""
        self._header_in_doubt = True
        await self._file.write(0, memoryview(header.build()))
        await self._file.node.flush()
        self.header = header
        self._header_in_doubt = False

    async def change_header(self, change: Callable[[Header], Header]) -> None:
        """Bring the header as ``change`` makes it to stable storage. Raises ``OSError``.

        What it does not refer to any more is in use until the next flush: the dirty bit says so.
        """
        async with self._one:
            await self.put_header(_in_use(change(self.header)))

    async def _mark_in_use(self) -> None:
        if _in_use(self.header) != self.header or self._header_in_doubt:
            await self.put_header(_in_use(self.header))

    async def mark_corrupt(self) -> None:
        """Let nobody write to the image again before it is repaired. Raises ``OSError``."""
        async with self._one:
            if self.header.version >= 3:
                bits = self.header.incompatible | Incompatible.CORRUPT
                await self.put_header(replace(self.header, incompatible=bits))

    # -- freed clusters ----------------------------------------------------------------------

    async def _release(self) -> None:
        """Make free what no request from before it was freed can still read or write."""
        while self._waiting and self._requests.ended(self._waiting[0].epoch):
            await self._refcounts.release(self._waiting[0].clusters, self._discard)
            self._waiting.pop(0)

    async def _discard(self, offset: int, length: int) -> None:
        """It only gives back room, so errors don't count, nor what is less than a block."""
        block = limits.QCOW2_DISCARD_BYTES
        start, end = -(-offset // block) * block, (offset + length) // block * block
        if self._discard_freed and start < end:
            with suppress(OSError):
                await self._file.node.discard(start, end - start)

    async def close(self) -> None:
        """Write all back, give back the file's unused end, and clear the dirty bit.

        No request is under way. Raises ``OSError``, and then the dirty bit stays. It does after
        ``leaks``, too: whoever opens the image next finds them, as after a crash.
        """
        self._refcounts.free_abandoned()
        # The first one makes clusters free, the second writes that.
        await self.flush()
        await self.flush()
        if self.header.incompatible & Incompatible.DIRTY and not self.leaks:
            end = await self._refcounts.used_end()
            await self._file.shrink(end << self.header.cluster_bits)
            bits = self.header.incompatible & ~Incompatible.DIRTY
            await self.put_header(replace(self.header, incompatible=bits))


def _in_use(header: Header) -> Header:
    """The header of an image that is to be repaired by whoever opens it next, if it can say so."""
    if header.version < 3:
        return header
    return replace(header, incompatible=header.incompatible | Incompatible.DIRTY)


def join_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same clusters, each as often: a (first, count) goes on with what begins at its end.

    A guest that discards its disk frees one cluster at a time, and each run costs a discard.
    """
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _changed_parts(table: _TopTable) -> list[Change]:
    """What is to be written of a table; entries that lie side by side as one change."""
    if table.moved is not None:
        return [Change(table.offset, encode_words(table.moved))]
    changes: list[Change] = []
    for index in sorted(table.entries):
        offset = table.offset + index * _WORD.size
        data = _WORD.pack(table.entries[index])
        if changes and changes[-1].offset + len(changes[-1].data) == offset:
            last = changes.pop()
            offset, data = last.offset, last.data + data
        changes.append(Change(offset, data))
    return changes
