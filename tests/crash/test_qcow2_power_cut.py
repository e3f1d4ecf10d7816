"""The power fails at any step of what is written to an image's file, with any of it lost."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import Descriptor, Node
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, open_image, read_header
from blockd.errors import WouldBlock
from tests.helpers.driver_subjects import open_image as open_file_driver
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.power_cut_driver import PowerCutDriver
from tests.helpers.qcow2 import check, qemu_img_check

SIZE_BYTES = 1024 * 1024
OPERATIONS = 90
CUTS = 25
SECTOR_BYTES = 512
OPTIONS = ImageOptions(size_bytes=SIZE_BYTES, cluster_size_bytes=4096)
IMAGES = {
    "v3": OPTIONS,
    "v2": replace(OPTIONS, version=2),
    "tiny": replace(OPTIONS, cluster_size_bytes=512, refcount_bits=64),
    "subclusters": replace(OPTIONS, cluster_size_bytes=16 * limits.KIB, extended_l2=True),
}


@dataclass
class Guest:
    """What the guest wrote, and what of it was flushed when."""

    content: bytearray = field(default_factory=lambda: bytearray(SIZE_BYTES))
    #: For each flush: how many steps had been made when it returned, and what the image held.
    flushed: list[tuple[int, bytes]] = field(default_factory=list)
    #: The number of flushes before each sector's changes.
    changes: dict[int, set[int]] = field(default_factory=dict)

    def note_flush(self, steps: int) -> None:
        self.flushed.append((steps, bytes(self.content)))

    def note_change(self, offset: int, length: int) -> None:
        for sector in range(offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES):
            self.changes.setdefault(sector, set()).add(len(self.flushed))

    def find_loss(self, now: bytearray, cut: int) -> int | None:
        """A sector that was flushed before the cut, not touched since, and is not there."""
        number = max(at for at, (steps, _) in enumerate(self.flushed) if steps <= cut)
        content = self.flushed[number][1]
        for sector in range(SIZE_BYTES // SECTOR_BYTES):
            at = sector * SECTOR_BYTES
            same = now[at : at + SECTOR_BYTES] == content[at : at + SECTOR_BYTES]
            if not same and number + 1 not in self.changes[sector]:
                return sector
        return None


async def empty_image(options: ImageOptions) -> bytes:
    storage = MemoryDriver(0)
    await create_image(Node("new", storage), options)
    return bytes(storage.data)


async def open_driver(file: Node) -> Qcow2Driver:
    image = await open_image(file, await read_header(file), discard_freed=True)
    return Qcow2Driver(image, direct=False, flushes=True, unmap=True)


async def work(driver: Qcow2Driver, disk: PowerCutDriver, rng: random.Random) -> Guest:
    guest = Guest()
    guest.note_flush(len(disk.steps))
    cluster = driver.header.cluster_size_bytes
    for _ in range(OPERATIONS):
        offset = rng.randrange(SIZE_BYTES // 512) * 512
        length = min(rng.choice([512, 4096, 40_960]), SIZE_BYTES - offset)
        kind = rng.randrange(10)
        guest.note_change(offset, length)
        if kind < 4:
            data = rng.randbytes(length)
            await driver.write(offset, memoryview(data))
            guest.content[offset : offset + length] = data
        elif kind == 4:
            await driver.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            guest.content[offset : offset + length] = bytes(length)
        elif kind == 5:
            await driver.discard(offset, length)
            await driver.read(offset, memoryview(guest.content)[offset : offset + length])
        elif kind == 6:
            start = offset // cluster * cluster
            data = rng.randbytes(64) * (cluster // 64)
            guest.note_change(start, cluster)
            await driver.write_compressed(start, memoryview(data))
            guest.content[start : start + cluster] = data
        elif kind == 7:
            data, written = rng.randbytes(length), 0
            with suppress(WouldBlock):
                driver.write_nowait(offset, memoryview(data))
                written = length
            guest.content[offset : offset + written] = data[:written]
        elif kind == 8:
            await write_by(driver, guest, offset, length, rng)
        else:
            await driver.flush()
            guest.note_flush(len(disk.steps))
    return guest


async def write_by(
    driver: Qcow2Driver, guest: Guest, offset: int, length: int, rng: random.Random
) -> None:
    """By a thread, which stops before some cluster, or not."""
    data = rng.randbytes(length)
    cluster = driver.header.cluster_size_bytes
    stop = offset + length
    if rng.random() < 0.3:
        stop = max(offset, (offset + length // 2) // cluster * cluster)
    done = offset

    def call(target: Descriptor, end: int) -> int:
        nonlocal done
        if done < min(end, stop):
            target.write(done, memoryview(data)[done - offset : min(end, stop) - offset])
        done = max(done, min(end, stop))
        return done

    written = await driver.write_by(offset, length, call)
    guest.content[offset:written] = data[: written - offset]


@pytest.mark.parametrize("options", [*IMAGES.values()], ids=[*IMAGES])
async def test_a_power_cut_corrupts_nothing_and_loses_nothing_that_was_flushed(
    options: ImageOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that tables are also written back in between, and the file grows often.
    monkeypatch.setattr(limits, "QCOW2_L2_CACHE_BYTES", 8 * options.cluster_size_bytes)
    monkeypatch.setattr(limits, "QCOW2_GROWTH_BYTES", 32 * limits.KIB)
    rng = random.Random(1)
    disk = PowerCutDriver(await empty_image(options))
    driver = await open_driver(Node("file", disk))
    guest = await work(driver, disk, rng)
    await driver.close()
    for cut in sorted(rng.sample(range(len(disk.steps)), CUTS)):
        image = tmp_path / "image.qcow2"
        image.write_bytes(disk.left_after(cut, rng))
        assert qemu_img_check(image)["corruptions"] == 0, f"after step {cut}"
        await check_flushed(image, guest, cut)
        checked = check(image) if options.version == 3 else qemu_img_check(image)
        assert checked.get("corruptions", 0) == 0
        if options.version == 3:
            assert checked.get("leaks", 0) == 0, "what was left was not cleared up"


async def check_flushed(image: Path, guest: Guest, cut: int) -> None:
    """Open it, which repairs it, and read what was flushed and not touched since."""
    file = Node("file", open_file_driver(image))
    driver = await open_driver(file)
    now = bytearray(SIZE_BYTES)
    await driver.read(0, memoryview(now))
    assert guest.find_loss(now, cut) is None, f"after step {cut}"
    await driver.close()
    await file.driver.close()
