"""``null-co``: no storage. It reads as zeroes, and what is written is gone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import trio

from blockd.block.allocation import Allocation
from blockd.block.driver import Driver
from blockd.block.drivers.file import SECTOR_BYTES
from blockd.errors import WouldBlock
from blockd.extent import Extent

_DEFAULT_BYTES = 1024 * 1024 * 1024
_BLOCK = bytes(1024 * 1024)


class NullDriver(Driver):
    """For measuring what is above it. Each request takes ``latency_ns``.

    Unlike QEMU's, which leaves what it reads as it found it, this never shows old memory.
    """

    name = "null-co"

    def __init__(
        self,
        size_bytes: int | None = None,
        *,
        latency_ns: int = 0,
        read_zeroes: bool = False,
        read_only: bool = False,
    ) -> None:
        """``size_bytes`` None: 1 GiB. ``read_zeroes``: say so, when asked for the allocation."""
        self.size_bytes = (
            _DEFAULT_BYTES if size_bytes is None else -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        )
        self.read_only = read_only
        self._given_size_bytes = size_bytes
        self._latency_ns = latency_ns
        self._read_zeroes = read_zeroes
        plain = len(self.options) == 1
        self.filename = f"{self.name}://" if plain else f"json:{json.dumps(self.options)}"

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"read-zeroes": True} if self._read_zeroes else {}
        options["driver"] = self.name
        if self._latency_ns:
            options["latency-ns"] = self._latency_ns
        if self._given_size_bytes is not None:
            options["size"] = self._given_size_bytes
        return options

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if self._latency_ns:
            raise WouldBlock
        _fill_with_zeroes(view)

    def write_nowait(self, offset: int, view: memoryview) -> None:
        if self._latency_ns:
            raise WouldBlock

    async def _take_time(self) -> None:
        await trio.sleep(self._latency_ns / 1e9)

    async def read(self, offset: int, view: memoryview) -> None:
        await self._take_time()
        _fill_with_zeroes(view)

    async def write(self, offset: int, view: memoryview) -> None:
        await self._take_time()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._take_time()

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        return True

    async def discard(self, offset: int, length: int) -> None:
        await self._take_time()

    async def flush(self) -> None:
        await self._take_time()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        return [Allocation(Extent(offset, length), zero=self._read_zeroes)]

    async def allocated_bytes(self) -> int:
        return 0

    async def close(self) -> None:
        """There is nothing to give up."""


def _fill_with_zeroes(view: memoryview) -> None:
    for at in range(0, len(view), len(_BLOCK)):
        part = view[at : at + len(_BLOCK)]
        part[:] = _BLOCK[: len(part)]
