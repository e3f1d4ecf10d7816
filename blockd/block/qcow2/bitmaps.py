"""The bitmaps of an image: loaded when it is opened, stored when it is closed.

The order of what is written makes every instant sound. At an open, entries are marked as in use
before anything else can be written to the image: the marks are single bits, so whatever part of
them is on the disk is right. At a close the bitmaps, their tables and a new directory go to free
clusters; when they are durable, one write of the header puts them in the place of the old ones,
which are freed then.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import trio
from pyroaring import BitMap64

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap, Inconsistent, Recording, Stopped
from blockd.block.bitmap_store import KeptBitmap
from blockd.block.qcow2.bitmap_directory import (
    ALL_ONES,
    BitmapEntry,
    BitmapFlag,
    TableShape,
    build_directory,
    build_table,
    entry_bytes,
    parse_directory,
    parse_table,
    table_bytes,
)
from blockd.block.qcow2.extensions import BitmapsExtension
from blockd.block.qcow2.features import Autoclear
from blockd.block.qcow2.header import Header
from blockd.errors import BlockdError

log = logging.getLogger(__name__)

_INVALID = os.strerror(errno.EINVAL)


class Room(Protocol):
    """The image around its bitmaps; ``ImageRoom`` says what each of these does."""

    @property
    def header(self) -> Header: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def file_size_bytes(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def metadata(self) -> BitMap64: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes) -> None: ...
    async def allocate(self, length: int) -> int: ...
    def free(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    async def change_header(
        self, change: Callable[[Header], Header], *, leaks: bool = False
    ) -> None: ...
    def tell_damage(self, reason: str) -> None: ...


class Qcow2Bitmaps:
    """What one open image keeps of bitmaps."""

    def __init__(self, room: Room) -> None:
        #: The image as it is open now.
        self.room = room
        #: As the directory in the file has them; empty until ``load``.
        self._entries: list[BitmapEntry] = []
        #: (Offset, length) of what was put, and what nothing in the file refers to yet.
        self._taken: list[tuple[int, int]] = []
        #: Whether the file may have another directory than the header here says.
        self._header_in_doubt = False
        #: Whether the image's directory is there still, but can't be used.
        self._damaged = False
        #: What the directory was found to take, once.
        self._claimed: list[range] = []
        #: Held by whoever changes the directory.
        self._one = trio.Lock()

    @property
    def entries(self) -> Sequence[BitmapEntry]:
        """What the image's directory says."""
        return self._entries

    @property
    def keeps_any(self) -> bool:
        return self.room.header.version >= 3

    # -- at the open -------------------------------------------------------------------------

    async def load(self) -> Sequence[KeptBitmap]:
        """Damage costs the image its bitmaps, and nobody his disk."""
        try:
            return await self._load()
        except BlockdError as error:
            self.room.tell_damage(error.message)
            self._damaged, self._entries = True, []
            for clusters in self._claimed:
                # They may be anything, such as the guest's.
                self.room.metadata.remove_range(clusters.start, clusters.stop)
            return []
        finally:
            self._claimed.clear()

    async def _load(self) -> Sequence[KeptBitmap]:
        extension = self.room.header.extensions.bitmaps
        if extension is None:
            return []
        self._claim(extension.directory_offset, extension.directory_size_bytes)
        self._entries = await self._read_directory(extension)
        kept = [KeptBitmap(each.name, await self._load_one(each)) for each in self._entries]
        return [each for each, entry in zip(kept, self._entries, strict=True) if entry.nameable]

    def _claim(self, offset: int, length: int) -> None:
        """Take clusters that must have no other use, so what is read is bounded by the file."""
        room = self.room
        clusters = room.header.clusters_of(offset, length)
        if offset >= room.file_size_bytes and length:
            raise BlockdError("A bitmap lies beyond the end of the image's file")
        if room.metadata.range_cardinality(clusters.start, clusters.stop):
            raise BlockdError("A bitmap overlaps something else in the image")
        room.metadata.add_range(clusters.start, clusters.stop)
        self._claimed.append(clusters)

    async def find_again(self) -> None:
        """Take up with the image as it is opened again. Raises ``BlockdError``, ``OSError``."""
        if self._damaged:
            return
        extension = self.room.header.extensions.bitmaps
        entries = [] if extension is None else await self._read_directory(extension)
        if entries != self._entries:
            raise BlockdError("The image's bitmaps have been changed by somebody else meanwhile")
        if extension is not None:
            self._claim(extension.directory_offset, extension.directory_size_bytes)
        for entry in entries:
            for offset, length in await self._extents(entry):
                self._claim(offset, length)
        self._claimed.clear()

    async def _read_directory(self, extension: BitmapsExtension) -> list[BitmapEntry]:
        room = self.room
        data = await room.read(extension.directory_offset, extension.directory_size_bytes)
        return parse_directory(
            data,
            extension,
            size_bytes=room.size_bytes,
            cluster_size_bytes=room.header.cluster_size_bytes,
        )

    async def _load_one(self, entry: BitmapEntry) -> Recording | Stopped | Inconsistent:
        room = self.room
        self._claim(entry.table_offset, table_bytes(entry.table_words))
        words = await self._read_table(entry)
        await trio.lowlevel.checkpoint()
        for word in words:
            if word > ALL_ONES:
                self._claim(word, room.header.cluster_size_bytes)
        bits = Bits(room.size_bytes, entry.granularity_bytes)
        if entry.in_use or not entry.understood:
            return Inconsistent(bits)
        shape = self._shape(entry.granularity_bytes)
        if len(words) != shape.words:
            raise BlockdError(f"Could not read bitmap '{entry.name}' from image: {_INVALID}")
        for index, word in enumerate(words):
            first = index * shape.granules_per_cluster
            if word == ALL_ONES:
                bits.update_runs([(first, first + shape.granules_per_cluster)])
            elif word:
                bits.add_packed(first, await room.read(word, shape.cluster_size_bytes))
            if word:
                await trio.lowlevel.checkpoint()
        return Recording(bits) if BitmapFlag.AUTO in entry.flags else Stopped(bits)

    async def _read_table(self, entry: BitmapEntry) -> list[int]:
        data = await self.room.read(entry.table_offset, table_bytes(entry.table_words))
        try:
            return parse_table(data, self.room.header.cluster_size_bytes)
        except ValueError:
            raise BlockdError(
                "Could not read bitmap_table table from image for bitmap "
                f"'{entry.name}': {_INVALID}"
            ) from None

    async def mark_in_use(self) -> None:
        """The marks are single bits in the directory as it is, so none of it can get lost."""
        async with self._one:
            if self._damaged:
                # Before anything is written to the image: then nobody believes them any more.
                await self._put_header(None)
            if self._header_in_doubt:
                await self._put_header(self.room.header.extensions.bitmaps)
            extension = self.room.header.extensions.bitmaps
            if extension is None:
                return
            marked = [entry.marked_in_use() for entry in self._entries]
            if marked != self._entries:
                await self.room.write(extension.directory_offset, build_directory(marked))
                await self.room.flush()
                self._entries = marked

    def _shape(self, granularity_bytes: int) -> TableShape:
        room = self.room
        return TableShape.of(room.size_bytes, granularity_bytes, room.header.cluster_size_bytes)

    # -- while it is open --------------------------------------------------------------------

    def check_new(self, name: str, granularity_bytes: int, others: Sequence[DirtyBitmap]) -> None:
        room = self.room
        if not self.keeps_any:
            raise BlockdError("Cannot store dirty bitmaps in qcow2 v2 files")
        if room.read_only:
            raise BlockdError("No write access")
        if len(others) >= limits.QCOW2_BITMAPS:
            raise BlockdError("Maximum number of persistent bitmaps is already reached")
        if not _fit_into_directory(name, others):
            raise BlockdError("Not enough space in the bitmap directory")
        shape = self._shape(granularity_bytes)
        if not shape.words:
            raise BlockdError("The disk has no bytes, so the image has no room for a bitmap of it")
        if shape.words * shape.cluster_size_bytes > limits.QCOW2_BITMAP_BYTES:
            raise BlockdError(
                "Too much space will be occupied by the bitmap. Use larger granularity"
            )

    async def remove(self, name: str) -> None:
        async with self._one:
            entries = [entry for entry in self._entries if entry.name != name]
            if len(entries) == len(self._entries):
                return
            if self.room.read_only:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            await self._replace(entries)

    # -- at the close ------------------------------------------------------------------------

    async def store(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """New ones are put behind the others, the newest first, as QEMU does."""
        async with self._one:
            if self.room.read_only or not self.keeps_any:
                return
            names = {bitmap.name for bitmap in bitmaps}
            entries = {
                entry.name: entry
                for entry in self._entries
                if entry.name in names or not entry.nameable
            }
            try:
                for bitmap in bitmaps:
                    if not bitmap.inconsistent:
                        old = entries.get(bitmap.name)
                        entries[bitmap.name] = await self._store_one(bitmap, old)
            except BaseException:
                self._give_back()
                raise
            if list(entries.values()) != self._entries:
                await self._replace(list(entries.values()))

    async def _store_one(self, bitmap: DirtyBitmap, old: BitmapEntry | None) -> BitmapEntry:
        bits = bitmap.bits_to_keep()
        words = await self._write_bits(bits)
        flags = BitmapFlag.AUTO if bitmap.recording else BitmapFlag(0)
        if old is not None:
            flags |= old.flags & BitmapFlag.EXTRA_DATA_COMPATIBLE
        return BitmapEntry(
            name=bitmap.name,
            table_offset=await self._put(build_table(words)),
            table_words=len(words),
            flags=flags,
            granularity_bits=bits.granularity_bytes.bit_length() - 1,
            extra_data=b"" if old is None else old.extra_data,
        )

    async def _write_bits(self, bits: Bits) -> list[int]:
        """Write the clusters that have any bit set; the table's entries."""
        shape = self._shape(bits.granularity_bytes)
        words: list[int] = []
        for index in range(shape.words):
            first = index * shape.granules_per_cluster
            data = bits.packed(first, shape.granules_per_cluster)
            await trio.lowlevel.checkpoint()
            if data.count(0) == len(data):
                words.append(0)
            elif data.count(255) == len(data):
                words.append(ALL_ONES)
            else:
                words.append(await self._put(data))
        return words

    async def _put(self, data: bytes) -> int:
        """Write ``data`` to clusters of its own. What is in them behind it has no meaning."""
        offset = await self.room.allocate(len(data))
        self._taken.append((offset, len(data)))
        await self.room.write(offset, data)
        return offset

    def _give_back(self) -> None:
        """Free what was put, and what nothing in the file refers to."""
        while self._taken:
            self.room.free(*self._taken.pop())

    # -- the directory -----------------------------------------------------------------------

    async def _replace(self, entries: list[BitmapEntry]) -> None:
        """Put another directory in the place of the image's, and free what only the old one has.

        Where the header could not be written, nobody knows which one stands in the file, so
        nothing is freed: some clusters stay in use for nothing.
        """
        room, stays = self.room, set(entries)
        old = None if self._damaged else room.header.extensions.bitmaps
        try:
            gone = [each for each in self._entries if each not in stays]
            unused = [extent for entry in gone for extent in await self._extents(entry)]
            new = await self._put_directory(entries)
            await room.flush()
        except BaseException:
            self._give_back()
            raise
        self._taken.clear()
        await self._put_header(new)
        self._entries = entries
        if old is not None:
            room.free(old.directory_offset, old.directory_size_bytes)
        for offset, length in unused:
            room.free(offset, length)

    async def _put_header(self, bitmaps: BitmapsExtension | None) -> None:
        self._header_in_doubt = True
        # What a damaged directory says of clusters is not to be relied on to free them: a guest's
        # data may be there.
        await self.room.change_header(
            lambda header: _with_bitmaps(header, bitmaps), leaks=self._damaged
        )
        self._header_in_doubt = self._damaged = False

    async def _put_directory(self, entries: list[BitmapEntry]) -> BitmapsExtension | None:
        if not entries:
            return None
        data = build_directory(entries)
        if len(entries) > limits.QCOW2_BITMAPS or len(data) > limits.QCOW2_BITMAP_DIRECTORY_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return BitmapsExtension(len(entries), len(data), await self._put(data))

    async def _extents(self, entry: BitmapEntry) -> list[tuple[int, int]]:
        """(Offset, length) of what it takes in the file."""
        cluster_size = self.room.header.cluster_size_bytes
        words = await self._read_table(entry)
        table = (entry.table_offset, table_bytes(entry.table_words))
        return [table, *((word, cluster_size) for word in words if word > ALL_ONES)]


def _fit_into_directory(name: str, others: Sequence[DirtyBitmap]) -> bool:
    most = limits.QCOW2_BITMAP_DIRECTORY_BYTES
    if (len(others) + 1) * entry_bytes("n" * limits.BITMAP_NAME_BYTES) <= most:
        return True  # whatever they are called
    return sum(entry_bytes(each.name) for each in others) + entry_bytes(name) <= most


def _with_bitmaps(header: Header, bitmaps: BitmapsExtension | None) -> Header:
    autoclear = header.autoclear & ~Autoclear.BITMAPS
    if bitmaps is not None:
        autoclear |= Autoclear.BITMAPS
    return replace(
        header, autoclear=autoclear, extensions=replace(header.extensions, bitmaps=bitmaps)
    )
