"""The power fails at any step: no bitmap in an image calls clean what has changed, or is gone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.power_cut_driver import PowerCutDriver
from tests.helpers.qcow2 import qemu_img_check

SIZE_BYTES = 512 * 1024
GRANULE_BYTES = 4096
WRITES = 12
#: How many of the images that are left QEMU is asked about, too.
CHECKED = 12
OPTIONS = ImageOptions(size_bytes=SIZE_BYTES, cluster_size_bytes=4096)
NEVER = 1 << 30


class Life:
    """An image that is opened, written to and closed, again and again."""

    def __init__(self, content: bytes, rng: random.Random) -> None:
        self.disk = PowerCutDriver(content)
        self.rng = rng
        #: For each bitmap what the image held when it began to record, after which step it was in
        #: the image, and when somebody began to remove it.
        self.before: dict[str, bytes] = {}
        self.stored: dict[str, int] = {}
        self.removed: dict[str, int] = {}

    async def open(self) -> Node:
        return await opened(Node("file", self.disk))

    async def add(self, node: Node, name: str) -> None:
        self.before[name] = await content_of(node)
        node.bitmaps.add(name, GRANULE_BYTES).persistent = True

    async def write(self, node: Node) -> None:
        for _ in range(WRITES):
            offset = self.rng.randrange(SIZE_BYTES // 512) * 512
            length = min(self.rng.choice([512, 4096, 40_960]), SIZE_BYTES - offset)
            await node.write(offset, memoryview(self.rng.randbytes(length)))
            if self.rng.random() < 0.2:
                await node.flush()

    async def reopen(self, node: Node) -> None:
        """As a change of the node's options does it."""
        await node.flush()
        await node.keeper.save()
        await node.driver.suspend()
        await node.driver.resume()
        await node.keeper.resume()

    async def remove(self, node: Node, name: str) -> None:
        self.removed[name] = len(self.disk.steps)
        await node.keeper.remove(name)

    async def close(self, node: Node) -> None:
        await node.flush()
        await node.keeper.save()
        await node.close()
        for name in self.before:
            self.stored.setdefault(name, len(self.disk.steps))


async def opened(file: Node) -> Node:
    image = await open_image(file, await read_header(file), discard_freed=True)
    node = Node("n", Qcow2Driver(image, direct=False, flushes=True, unmap=True))
    await node.keeper.load(read_only=False)
    return node


async def content_of(node: Node) -> bytes:
    content = bytearray(SIZE_BYTES)
    await node.read(0, memoryview(content))
    return bytes(content)


async def live(life: Life) -> None:
    node = await life.open()
    await life.add(node, "first")
    await life.write(node)
    await life.close(node)
    node = await life.open()
    await life.add(node, "second")
    await life.write(node)
    await life.reopen(node)
    await life.write(node)
    await life.close(node)
    node = await life.open()
    await life.write(node)
    await life.remove(node, "first")
    await life.write(node)
    await node.make_read_only()


async def check_left(life: Life, cut: int, left: bytes) -> set[str]:
    """Open what is left; returns the states that bitmaps were found in."""
    node = await opened(Node("file", MemoryDriver(left)))
    found = {bitmap.name: bitmap for bitmap in node.bitmaps.list()}
    for name, steps in life.stored.items():
        if steps <= cut < life.removed.get(name, NEVER):
            assert name in found, f"'{name}' is gone after step {cut}"
    content = await content_of(node)
    for name, bitmap in found.items():
        if not bitmap.inconsistent:
            dirty = bitmap.copy_bits().extents()
            marked = {at for each in dirty for at in range(each.offset, each.end, GRANULE_BYTES)}
            missed = changed(life.before[name], content) - marked
            assert not missed, f"'{name}' calls clean what has changed, after step {cut}"
    return {"inconsistent" if each.inconsistent else "good" for each in found.values()} or {"none"}


def changed(before: bytes, now: bytes) -> set[int]:
    """Where the granules begin that are not the same."""
    return {
        at
        for at in range(0, SIZE_BYTES, GRANULE_BYTES)
        if before[at : at + GRANULE_BYTES] != now[at : at + GRANULE_BYTES]
    }


@pytest.mark.parametrize("seed", range(3))
async def test_bitmaps_survive_a_power_cut_or_are_inconsistent(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", 32 * limits.KIB)
    rng = random.Random(seed)
    storage = MemoryDriver(0)
    await create_image(Node("new", storage), OPTIONS)
    life = Life(bytes(storage.data), rng)
    await live(life)
    steps = range(len(life.disk.steps) + 1)
    checked = set(rng.sample(steps, CHECKED))
    seen: set[str] = set()
    for cut in steps:
        left = life.disk.left_after(cut, rng)
        seen |= await check_left(life, cut, left)
        if cut in checked:
            image = tmp_path / "image"
            image.write_bytes(left)
            assert qemu_img_check(image)["corruptions"] == 0, f"after step {cut}"
    assert seen == {"none", "good", "inconsistent"}


async def test_the_next_open_frees_what_a_removed_bitmap_took(tmp_path: Path) -> None:
    """Nothing else was changed in the image before the power failed."""
    storage = MemoryDriver(0)
    await create_image(Node("new", storage), OPTIONS)
    life = Life(bytes(storage.data), random.Random(1))
    node = await life.open()
    await life.add(node, "first")
    await life.write(node)
    await life.close(node)
    await life.remove(await life.open(), "first")
    left = MemoryDriver(bytes(life.disk.data))
    node = await opened(Node("file", left))
    await node.close()
    (tmp_path / "image").write_bytes(left.data)
    assert qemu_img_check(tmp_path / "image") == {"corruptions": 0, "leaks": 0}
