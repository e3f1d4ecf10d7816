"""Reading what the guest sees."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from blockd import limits
from blockd.block.node import Node
from blockd.block.qcow2.compressed import decompress
from blockd.block.qcow2.entries import CorruptImageError, Kind, Run
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.host_file import HostFile
from blockd.block.qcow2.mapping import Mapping
from blockd.errors import WouldBlock

_ZEROES = bytes(limits.MIB)


def fill_zeroes(view: memoryview) -> None:
    for at in range(0, len(view), len(_ZEROES)):
        piece = view[at : at + len(_ZEROES)]
        piece[:] = _ZEROES[: len(piece)]


@dataclass(slots=True)
class Reader:
    """Reads through the mapping: from the file, the data file, or the backing node.

    A backing node that is shorter than the image reads as zeroes past its end.
    """

    mapping: Mapping
    file: HostFile
    data_file: HostFile
    backing: Node | None
    compression: CompressionType

    def read_nowait(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, or raise ``WouldBlock`` (its content is then undefined)."""
        host = self.mapping.find_cluster(offset, len(view))
        if host is not None:
            self.data_file.node.read_nowait(host, view)
            return
        run = self.mapping.find_nowait(offset, len(view))
        if run is None:
            raise WouldBlock
        if run.length == len(view):
            self._read_run_nowait(run, offset, view)
            return
        at = 0
        while True:
            self._read_run_nowait(run, offset + at, view[at : at + run.length])
            at += run.length
            if at == len(view):
                return
            run = self.mapping.find_nowait(offset + at, len(view) - at)
            if run is None:
                raise WouldBlock

    def _read_run_nowait(self, run: Run, offset: int, view: memoryview) -> None:
        if run.kind is Kind.DATA:
            self.data_file.node.read_nowait(run.host, view)
        elif run.kind is Kind.ZERO:
            fill_zeroes(view)
        elif run.kind is Kind.UNALLOCATED:
            inside = self.inside_backing(offset, len(view))
            if inside:
                assert self.backing is not None
                self.backing.read_nowait(offset, view[:inside])
            fill_zeroes(view[inside:])
        else:
            raise WouldBlock

    def inside_backing(self, offset: int, length: int) -> int:
        """How many bytes from ``offset`` on the backing node has."""
        if self.backing is None:
            return 0
        return max(0, min(length, self.backing.size_bytes - offset))

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``. Raises ``OSError``."""
        while view:
            run = await self.mapping.find(offset, len(view))
            await self._read_run(run, offset, view[: run.length])
            offset += run.length
            view = view[run.length :]

    async def _read_run(self, run: Run, offset: int, view: memoryview) -> None:
        if run.kind is Kind.DATA:
            if run.host >= self.data_file.node.size_bytes:
                raise _beyond_end("data", run.host)
            self.file.debug_event("read_aio")
            await self.data_file.read(run.host, view)
        elif run.kind is Kind.ZERO:
            fill_zeroes(view)
        elif run.kind is Kind.UNALLOCATED:
            inside = self.inside_backing(offset, len(view))
            if inside:
                await self._read_backing(offset, view[:inside])
            fill_zeroes(view[inside:])
        else:
            await self._read_compressed(run, offset, view)

    async def _read_backing(self, offset: int, view: memoryview) -> None:
        assert self.backing is not None
        self.file.debug_event("read_backing_aio")
        try:
            self.backing.read_nowait(offset, view)
        except WouldBlock:
            await self.backing.read(offset, view)

    async def _read_compressed(self, run: Run, offset: int, view: memoryview) -> None:
        geometry = self.mapping.geometry
        host, length = geometry.compressed_extent(run.host)
        if host >= self.file.node.size_bytes:
            raise _beyond_end("compressed data", host)
        self.file.debug_event("read_compressed")
        packed = await self.file.read_bytes(host, length)
        data = await trio.to_thread.run_sync(
            decompress, self.compression, bytes(packed), geometry.cluster_bytes
        )
        inside = offset & (geometry.cluster_bytes - 1)
        view[:] = data[inside : inside + len(view)]

    async def reads_as_zeroes(self, offset: int, length: int) -> bool:
        """Whether the mapping alone says so: nothing is read for it but tables."""
        while length > 0:
            run = await self.mapping.find(offset, length)
            if not self._is_zero(run, offset):
                return False
            offset += run.length
            length -= run.length
        return True

    def reads_as_zeroes_nowait(self, offset: int, length: int) -> bool:
        """Whether one lookup in the tables in memory says so."""
        run = self.mapping.find_nowait(offset, length) if length > 0 else None
        return length <= 0 or (
            run is not None and run.length == length and self._is_zero(run, offset)
        )

    def _is_zero(self, run: Run, offset: int) -> bool:
        if run.kind is Kind.UNALLOCATED:
            return not self.inside_backing(offset, run.length)
        return run.kind is Kind.ZERO


def _beyond_end(what: str, offset: int) -> CorruptImageError:
    """Such as in a file that was cut off: all else of the image may be as good as ever."""
    return CorruptImageError(
        f"{what} offset {offset:#x} is beyond the end of the file", fatal=False
    )
