"""Images that blockd and QEMU write in turn hold what a model in memory says, and are sound."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from blockd.block import Descriptor, Node
from blockd.block.qcow2 import Qcow2Driver, open_image, read_header
from blockd.errors import WouldBlock
from tests.helpers.driver_subjects import open_image as open_file_driver
from tests.helpers.qcow2 import check, options, qemu_img, qemu_img_check, qemu_io

MIB = 1 << 20
ROUNDS = 3
STRIPES = 5


@dataclass(frozen=True)
class Case:
    """How an image is made. ``backing``: the size of its backing file in the image's size."""

    options: tuple[str, ...] = ()
    size_bytes: int = 3 * MIB - 1536
    backing: float | None = None
    snapshots: bool = False
    compressed: bool = True


CASES = {
    "plain": Case(),
    "v2": Case(("compat=0.10",)),
    "v2-backing": Case(("compat=0.10",), backing=1),
    "v2-snapshots": Case(("compat=0.10",), snapshots=True),
    "snapshots": Case(snapshots=True, backing=0.5),
    "clusters-512": Case(("cluster_size=512",), MIB),
    "refcounts-1": Case(("cluster_size=512", "refcount_bits=1"), MIB),
    "refcounts-2": Case(("cluster_size=4096", "refcount_bits=2"), 2 * MIB),
    "refcounts-4": Case(("cluster_size=8k", "refcount_bits=4"), backing=1.5),
    "refcounts-8-zstd": Case(("cluster_size=4k", "refcount_bits=8", "compression_type=zstd")),
    "refcounts-32": Case(("cluster_size=8k", "refcount_bits=32", "lazy_refcounts=on")),
    "refcounts-64": Case(("cluster_size=1024", "refcount_bits=64"), MIB, snapshots=True),
    "clusters-2m": Case(("cluster_size=2M",), 9 * MIB, backing=1),
    "subclusters": Case(("extended_l2=on", "cluster_size=16k"), 2 * MIB, snapshots=True),
    "subclusters-backing": Case(("extended_l2=on",), backing=0.7),
    "data-file": Case(("data_file=data",), compressed=False),
    "raw-data-file": Case(("data_file=data", "data_file_raw=on"), compressed=False),
}


@dataclass
class Image:
    """An image on disk and the model of it."""

    path: Path
    case: Case
    model: bytearray

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Qcow2Driver]:
        """The image as blockd opens it; it is closed in order."""
        directory = self.path.parent
        file = Node("file", open_file_driver(self.path))
        nodes = [file]
        backing = data = None
        if self.case.backing is not None:
            backing = Node("backing", open_file_driver(directory / "backing"))
            nodes.append(backing)
        header = await read_header(file)
        if header.has_data_file:
            data = Node("data", open_file_driver(directory / "data"))
            nodes.append(data)
        image = await open_image(file, header, backing=backing, data_file=data, discard_freed=True)
        driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
        yield driver
        await driver.close()
        for node in nodes:
            await node.driver.close()

    def some_range(self, rng: random.Random, start: int, end: int) -> tuple[int, int]:
        offset = rng.randrange(start, end)
        if rng.random() < 0.5:
            offset = max(offset // 512 * 512, start)
        return offset, min(rng.randint(1, rng.choice([600, 5000, 200_000])), end - offset)


def make(directory: Path, case: Case, rng: random.Random) -> Image:
    image = Image(directory / "image", case, bytearray(case.size_bytes))
    arguments = options(*(each.replace("=data", f"={directory}/data") for each in case.options))
    if case.backing is not None:
        backing = rng.randbytes(int(case.size_bytes * case.backing) // 512 * 512)
        (directory / "backing").write_bytes(backing)
        arguments += ["-b", str(directory / "backing"), "-F", "raw"]
        image.model = bytearray(backing[: case.size_bytes].ljust(case.size_bytes, b"\0"))
    qemu_img("create", "-f", "qcow2", *arguments, image.path, str(case.size_bytes))
    if case.compressed:
        # QEMU compresses only where the image holds nothing yet.
        cluster = cluster_bytes(image.path)
        for number in range(1, min(7, case.size_bytes // cluster)):
            qemu_io(image.path, f"write -c -P {number} {number * cluster} {cluster}")
            start = number * cluster
            image.model[start : start + cluster] = bytes([number]) * cluster
    return image


def write_by_qemu(image: Image, rng: random.Random) -> None:
    """A few writes by QEMU, of every kind it has."""
    for _ in range(6):
        offset, length = image.some_range(rng, 0, image.case.size_bytes)
        pattern = rng.randrange(1, 255)
        kind = rng.choice([f"-P {pattern}", f"-P {pattern}", "-z", "-z -u"])
        qemu_io(image.path, f"write {kind} {offset} {length}")
        written = 0 if kind.startswith("-z") else pattern
        image.model[offset : offset + length] = bytes([written]) * length


def cluster_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 1 << int.from_bytes(file.read(24)[20:24], "big")


async def work_on(
    image: Image, driver: Qcow2Driver, start: int, end: int, rng: random.Random
) -> None:
    """Operations of every kind in a range of one's own."""
    model = image.model
    for _ in range(8):
        offset, length = image.some_range(rng, start, end)
        match rng.randrange(10):
            case 0 | 1 | 2:
                data = rng.randbytes(length)
                await driver.write(offset, memoryview(data))
                model[offset : offset + length] = data
            case 3:
                data = rng.randbytes(length)
                try:
                    driver.write_nowait(offset, memoryview(data))
                    model[offset : offset + length] = data
                except WouldBlock:
                    pass
            case 4 | 5:
                await driver.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 6:
                await driver.discard(offset, length)
                await driver.read(offset, memoryview(model)[offset : offset + length])
            case 7:
                await driver.flush()
            case 8:
                await write_by(image, driver, offset, length, rng)
            case 9 if image.case.compressed:
                await compress(image, driver, offset, end, rng)


async def write_by(
    image: Image, driver: Qcow2Driver, offset: int, length: int, rng: random.Random
) -> None:
    """What of a range can be written by a thread with a descriptor."""
    data = rng.randbytes(length)
    done = offset

    def call(target: Descriptor, end: int) -> int:
        nonlocal done
        target.write(done, memoryview(data)[done - offset : end - offset])
        done = end
        return end

    assert driver.takes_write_by
    assert await driver.write_by(offset, length, call) == done
    image.model[offset:done] = data[: done - offset]


async def compress(
    image: Image, driver: Qcow2Driver, start: int, end: int, rng: random.Random
) -> None:
    cluster = driver.header.cluster_size_bytes
    offset = -(-start // cluster) * cluster
    length = min(cluster * rng.randint(1, 3), end - offset)
    if length > 0 and (length % cluster == 0 or offset + length == image.case.size_bytes):
        data = (rng.randbytes(16) * -(-length // 16))[:length]
        await driver.write_compressed(offset, memoryview(data))
        image.model[offset : offset + length] = data


async def write_by_blockd(image: Image, rng: random.Random) -> None:
    async with image.opened() as driver:
        await check_content(image, driver)
        size = image.case.size_bytes
        borders = [0, *sorted(rng.randrange(size) for _ in range(STRIPES - 1)), size]
        async with trio.open_nursery() as nursery:
            for start, end in itertools.pairwise(borders):
                if start < end:
                    seed = random.Random(rng.random())
                    nursery.start_soon(partial(work_on, image, driver, start, end, seed))
        await check_content(image, driver)


async def check_content(image: Image, driver: Qcow2Driver) -> None:
    now = bytearray(image.case.size_bytes)
    await driver.read(0, memoryview(now))
    assert now == image.model


def check_by_qemu(image: Image) -> None:
    check(image.path)
    model = image.path.parent / "model"
    model.write_bytes(image.model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image.path, model)


def snapshot_content(image: Image, name: str) -> bytes:
    copy = image.path.parent / "snapshot"
    source = ["-f", "qcow2", "-l", f"snapshot.name={name}"]
    qemu_img("convert", *source, "-O", "raw", image.path, copy)
    return copy.read_bytes()


@pytest.mark.parametrize("case", [*CASES.values()], ids=[*CASES])
async def test_content_is_the_same_for_blockd_for_qemu_and_for_a_model(
    case: Case, tmp_path: Path
) -> None:
    rng = random.Random(str(case))
    image = make(tmp_path, case, rng)
    snapshots: dict[str, bytes] = {}
    for number in range(ROUNDS):
        write_by_qemu(image, rng)
        if case.snapshots:
            name = f"snapshot{number}"
            qemu_img("snapshot", "-c", name, image.path)
            snapshots[name] = snapshot_content(image, name)
        await write_by_blockd(image, rng)
        check_by_qemu(image)
    for name, content in snapshots.items():
        assert snapshot_content(image, name) == content


@pytest.mark.parametrize("case", [*CASES.values()], ids=[*CASES])
async def test_images_can_be_resized(case: Case, tmp_path: Path) -> None:
    rng = random.Random(str(case))
    image = make(tmp_path, case, rng)
    for factor in (1.0, 0.4, 1.7, 0.9):
        size = int(case.size_bytes * factor) // 512 * 512
        async with image.opened() as driver:
            await driver.truncate(size)
            assert driver.size_bytes == size
            image.model = image.model[:size].ljust(size, b"\0")
            image.case = Case(case.options, size, case.backing, compressed=case.compressed)
            await check_content(image, driver)
            await work_on(image, driver, 0, size, rng)
        check_by_qemu(image)


async def test_what_a_killed_blockd_leaves_is_found_by_the_next_one(tmp_path: Path) -> None:
    image = make(tmp_path, Case(), random.Random(1))
    file = Node("file", open_file_driver(image.path))
    killed = Qcow2Driver(
        await open_image(file, await read_header(file)), direct=False, flushes=True, unmap=True
    )
    await killed.write(0, memoryview(b"x" * MIB))
    await killed.flush()
    await killed.discard(0, MIB)
    await killed.flush()
    image.model[:MIB] = bytes(MIB)
    await file.driver.close()
    assert qemu_img_check(image.path)["corruptions"] == 0
    async with image.opened():
        pass
    check_by_qemu(image)
