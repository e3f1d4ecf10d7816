"""A node whose image keeps its bitmaps: when it is asked to, and what becomes of its errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from blockd.bitmap import Bits, DirtyBitmap, Recording
from blockd.block import Graph
from blockd.block.bitmap_store import KeptBitmap
from blockd.errors import BlockdError
from tests.helpers.memory_driver import MemoryDriver

SIZE = 1 << 20
GRANULARITY = 65536


class Store:
    """Remembers what it is asked; ``fail`` makes it fail."""

    keeps_any = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail = False
        self.fail_mark = False

    def _ask(self, what: str) -> None:
        if self.fail or (self.fail_mark and what == "mark"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.asked.append(what)

    async def load(self) -> Sequence[KeptBitmap]:
        self._ask("load")
        return [KeptBitmap("kept", Recording(Bits(SIZE, GRANULARITY)))]

    async def mark_in_use(self) -> None:
        self._ask("mark")

    def check_new(self, name: str, granularity_bytes: int, others: Sequence[DirtyBitmap]) -> None:
        if name == "no":
            raise BlockdError("No write access")

    async def remove(self, name: str) -> None:
        self._ask(f"remove {name}")

    async def store(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        self._ask(f"store {[each.name for each in bitmaps]}")


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def driver(store: Store) -> MemoryDriver:
    driver = MemoryDriver(SIZE)
    driver.bitmap_store = store
    return driver


async def test_they_are_loaded_and_stored(store: Store, driver: MemoryDriver) -> None:
    graph = Graph()
    node = graph.add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    await graph.remove(node)
    assert store.asked == ["load", "mark", "store ['kept']"]


async def test_one_that_is_not_kept_is_not_asked_for(store: Store, driver: MemoryDriver) -> None:
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    node.bitmaps.add("t", GRANULARITY)
    await node.keeper.remove("t")
    await node.keeper.remove("kept")
    assert store.asked == ["load", "mark", "remove kept"]
    assert node.bitmaps.list() == ()


async def test_what_cannot_be_removed_from_the_image_stays(
    store: Store, driver: MemoryDriver
) -> None:
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    store.fail = True
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        await node.keeper.remove("kept")
    assert [each.name for each in node.bitmaps.list()] == ["kept"]


async def test_a_loss_is_told(
    store: Store, driver: MemoryDriver, caplog: pytest.LogCaptureFixture
) -> None:
    graph = Graph()
    node = graph.add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    store.fail = True
    await graph.close()
    assert "bitmaps of node 'n' are lost: No space left on device" in caplog.text
    assert graph.find("n") is None


async def test_a_loss_with_the_data_they_speak_of_is_told(
    store: Store, driver: MemoryDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the flush of all nodes at the end fails, but that before the bitmaps are stored."""
    graph = Graph()
    node = graph.add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    driver.fail("flush", errno.EIO, nth=2)
    await graph.close()
    assert "bitmaps of node 'n' are lost: Input/output error" in caplog.text
    assert store.asked == ["load", "mark"]


async def test_what_was_not_loaded_is_not_replaced(store: Store, driver: MemoryDriver) -> None:
    graph = Graph()
    node = graph.add("n", driver, owned=True)
    store.fail = True
    with pytest.raises(BlockdError, match="Failed to read bitmap directory: No space left"):
        await node.keeper.load(read_only=False)
    store.fail = False
    await graph.remove(node)
    assert store.asked == []


async def test_what_may_be_in_use_is_stored_after_a_failed_open(
    store: Store, driver: MemoryDriver
) -> None:
    graph = Graph()
    node = graph.add("n", driver, owned=True)
    store.fail_mark = True
    with pytest.raises(BlockdError, match="Can't update bitmap directory: No space left"):
        await node.keeper.load(read_only=False)
    await graph.remove(node)
    assert store.asked == ["load", "store ['kept']"]


async def test_they_are_stored_before_a_node_becomes_read_only(
    store: Store, driver: MemoryDriver
) -> None:
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    node.bitmaps.add("t", GRANULARITY)
    await node.make_read_only()
    assert store.asked == ["load", "mark", "store ['kept']"]
    with pytest.raises(BlockdError, match="Bitmap 'kept' is readonly and cannot be modified"):
        node.bitmaps.get("kept").clear()
    node.bitmaps.get("t").clear()


async def test_a_node_that_stays_writable_has_them_in_use_again(
    store: Store, driver: MemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(driver, "make_read_only", fail)
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await node.make_read_only()
    assert store.asked == ["load", "mark", "store ['kept']", "mark"]
    assert not node.read_only
    await node.write(0, memoryview(b"x"))
    assert node.bitmaps.get("kept").count_bytes == GRANULARITY


async def test_where_they_cannot_be_in_use_again_nothing_is_written(
    store: Store, driver: MemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        store.fail = True
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(driver, "make_read_only", fail)
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        await node.make_read_only()
    with pytest.raises(PermissionError):
        await node.write(0, memoryview(b"x"))


async def test_a_frozen_one_is_kept_with_all_that_may_come_back(
    store: Store, driver: MemoryDriver
) -> None:
    node = Graph().add("n", driver, owned=True)
    await node.keeper.load(read_only=False)
    await node.write(0, memoryview(b"x"))
    bitmap = node.bitmaps.get("kept")
    bitmap.freeze("a backup")
    await node.write(5 * GRANULARITY, memoryview(b"x"))
    assert bitmap.bits_to_keep().count_bytes == 2 * GRANULARITY


def test_new_ones_are_refused_with_the_node_named(driver: MemoryDriver) -> None:
    node = Graph().add("n", driver, owned=True)
    node.keeper.check_new("b", GRANULARITY)
    with pytest.raises(BlockdError, match="Can't make bitmap 'no' persistent in 'n': No write"):
        node.keeper.check_new("no", GRANULARITY)
