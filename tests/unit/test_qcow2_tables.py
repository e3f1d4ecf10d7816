"""The cache of an image's tables, where a change comes while the table is being read."""

from __future__ import annotations

from array import array

import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block.qcow2.tables import TableCache
from blockd.block.qcow2.words import encode_words

OLD = array("Q", [1] * 64)
NEW = array("Q", [2] * 64)


async def test_a_table_that_moved_is_not_replaced_by_what_was_read_of_it() -> None:
    """It was dropped to make room, and read again for somebody, while it was being copied."""
    gate = trio.Event()

    async def read(offset: int) -> array[int]:
        await gate.wait()
        return OLD[:]

    cache = TableCache(512, 8, read, encode_words)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.load, 3, 0x1000)
        await wait_all_tasks_blocked()
        moved = cache.put(3, 0x2000, NEW[:])
        gate.set()
    assert cache.peek(3) is moved
    assert await cache.load(3, 0x2000) is moved
    assert cache.take_changes() == [(0x2000, encode_words(NEW))]
