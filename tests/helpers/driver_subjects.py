"""Every driver, over storage of its own, for the tests that all of them must pass."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.backup import CopyBeforeWriteDriver, Keeping
from blockd.block import Driver, Graph, Node
from blockd.block.drivers.blkdebug import BlkdebugDriver
from blockd.block.drivers.copy_on_read import CopyOnReadDriver
from blockd.block.drivers.file import FileDriver
from blockd.block.drivers.opening import open_file
from blockd.block.drivers.raw import RawDriver
from blockd.block.drivers.throttle import ThrottleDriver
from blockd.block.qcow2 import ImageOptions, Qcow2Driver, create_image, read_header
from blockd.block.qcow2 import open_image as open_qcow2
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.listener import UnixAddress
from blockd.nbd import Export, NbdServer, Settings
from blockd.nbd.client import NbdDriver, Target
from blockd.objects import Bucket, ThrottleGroup, ThrottleLimits
from tests.helpers.loop_device import loop_device
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.memory_overlay import MemoryOverlay
from tests.helpers.nbd_process import nbdkit, qemu_nbd, serving

#: No multiple of a sector, so that a file has a tail beyond its end.
FILE_BYTES = 300_001
#: Data here, holes elsewhere.
DATA_RUNS = [(0, 70_000), (131_072, 5_000), (200_000, 100_001)]
MEMORY_FILE_SYSTEM = Path("/dev/shm")


@dataclass
class Subject:
    """``model`` is what the driver's storage holds; ``unmap``: whether discards reach it.

    ``fixed_size``: it can't be resized. ``close``: ends what it stands on.
    """

    driver: Driver
    model: bytearray
    unmap: bool = True
    fixed_size: bool = False
    close: Callable[[], Awaitable[None]] | None = None


def sparse_content(size: int = FILE_BYTES) -> bytearray:
    content = bytearray(size)
    for offset, length in DATA_RUNS:
        content[offset : offset + length] = random.Random(offset).randbytes(length)
    return content[:size]


def write_sparse(path: Path) -> None:
    content = sparse_content()
    with path.open("wb") as file:
        file.truncate(FILE_BYTES)
        for offset, length in DATA_RUNS:
            file.seek(offset)
            file.write(content[offset : offset + length])


def open_image(
    path: Path | str, *, direct: bool = False, unmap: bool = True, driver: str = "file"
) -> FileDriver:
    """A driver over ``path``; skips the test where the file system has no O_DIRECT."""
    try:
        return open_file(
            str(path),
            driver=driver,
            read_only=False,
            auto_read_only=False,
            direct=direct,
            unmap=unmap,
            flushes=True,
        )
    except BlockdError as error:
        if "does not support O_DIRECT" not in error.message:
            raise
        pytest.skip(error.message)


@contextmanager
def file(directory: Path, *, direct: bool = False, unmap: bool = True) -> Iterator[Subject]:
    path = directory / "image"
    write_sparse(path)
    driver = open_image(path, direct=direct, unmap=unmap)
    model = sparse_content() + bytes(driver.size_bytes - FILE_BYTES)
    yield Subject(driver, model, unmap=unmap)


@contextmanager
def memory_file(_: Path, *, direct: bool = False) -> Iterator[Subject]:
    """A file of tmpfs, which has neither RWF_NOWAIT nor FALLOC_FL_ZERO_RANGE."""
    if not MEMORY_FILE_SYSTEM.is_dir():
        pytest.skip(f"{MEMORY_FILE_SYSTEM} does not exist")
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_FILE_SYSTEM) as directory,
        file(Path(directory), direct=direct) as subject,
    ):
        yield subject


@contextmanager
def device(directory: Path, *, direct: bool = False, sector_bytes: int = 512) -> Iterator[Subject]:
    path = directory / "backing"
    write_sparse(path)
    size = FILE_BYTES // 4096 * 4096
    with path.open("r+b") as backing:
        backing.truncate(size)
    with loop_device(path, sector_bytes=sector_bytes) as name:
        yield Subject(open_image(name, direct=direct, driver="host_device"), sparse_content(size))


@contextmanager
def raw(directory: Path, *, offset: int = 0, size: int | None = None) -> Iterator[Subject]:
    with file(directory) as below:
        child = Node("child", below.driver)
        driver = RawDriver(child, read_only=False, offset_bytes=offset, size_bytes=size)
        end = len(below.model) if size is None else offset + size
        yield Subject(driver, below.model[offset:end], fixed_size=size is not None)


@contextmanager
def memory(_: Path) -> Iterator[Subject]:
    yield Subject(MemoryDriver(bytes(sparse_content())), sparse_content())


@contextmanager
def memory_inline(directory: Path) -> Iterator[Subject]:
    with memory(directory) as subject:
        assert isinstance(subject.driver, MemoryDriver)
        subject.driver.nowait = lambda _: True
        yield subject


@contextmanager
def filtered(directory: Path, make: Callable[[Node], Driver]) -> Iterator[Subject]:
    with file(directory) as below:
        yield Subject(make(Node("child", below.driver)), below.model)


def throttled(child: Node) -> Driver:
    return ThrottleDriver(child, ThrottleGroup(ThrottleLimits(iops_total=Bucket(10**6))), "group")


@contextmanager
def copying_on_read(_: Path) -> Iterator[Subject]:
    backing = Node("backing", MemoryDriver(bytes(sparse_content())))
    overlay = MemoryOverlay(FILE_BYTES, backing)
    yield Subject(CopyOnReadDriver(Node("overlay", overlay)), sparse_content())


def keeping_an_instant(_: ExitStack, __: Path) -> LaterSubject:
    async def put_over(tasks: trio.Nursery) -> Subject:
        graph = Graph(tasks)
        child = graph.add("child", MemoryDriver(bytes(sparse_content())), owned=True)
        target = graph.add("target", MemoryDriver(FILE_BYTES), owned=True)
        driver = await CopyBeforeWriteDriver.open(
            graph, "node 'filter'", child, target, Keeping(), read_only=False
        )
        return Subject(driver, sparse_content(), fixed_size=True)

    return put_over


def over_nbd(stack: ExitStack, directory: Path, command: list[str]) -> LaterSubject:
    """An export of the file that ``command`` serves."""
    process = stack.enter_context(serving(command, directory / "nbd.sock"))
    target = Target(UnixAddress(str(process.socket_path)))

    async def connect(tasks: trio.Nursery) -> Subject:
        driver = await NbdDriver.open(target, tasks, read_only=False, auto_read_only=False)
        model = sparse_content() + bytes(driver.size_bytes - FILE_BYTES)
        return Subject(driver, model, fixed_size=True)

    return connect


def over_qemu_nbd(stack: ExitStack, directory: Path) -> LaterSubject:
    write_sparse(directory / "image")
    return over_nbd(stack, directory, qemu_nbd(directory / "image"))


def over_nbdkit(stack: ExitStack, directory: Path, *, block_bytes: int) -> LaterSubject:
    """A server that takes whole blocks only, and no large ones."""
    path = directory / "image"
    write_sparse(path)
    os.truncate(path, -(-FILE_BYTES // block_bytes) * block_bytes)
    command = nbdkit("--filter=blocksize-policy", "file", str(path))
    policy = [f"blocksize-minimum={block_bytes}", "blocksize-maximum=64K"]
    return over_nbd(stack, directory, [*command, *policy, "blocksize-error-policy=error"])


def over_an_old_server(stack: ExitStack, directory: Path) -> LaterSubject:
    """A server without fixed newstyle negotiation: only the export's name can be told to it."""
    write_sparse(directory / "image")
    command = nbdkit("--mask-handshake=0", "--no-sr", "file", str(directory / "image"))
    return over_nbd(stack, directory, command)


def over_blockd(_: ExitStack, directory: Path) -> LaterSubject:
    """Our own server, in this process."""

    async def connect(tasks: trio.Nursery) -> Subject:
        write_sparse(directory / "image")
        graph, server = Graph(tasks), NbdServer(tasks, Bus())
        address = UnixAddress(str(directory / "nbd.sock"))
        await server.start(address, Settings())
        node = graph.add("node", open_image(directory / "image"), owned=True)
        export = Export(
            "export",
            node,
            name="",
            description="",
            writable=True,
            writethrough=False,
            graph=graph,
        )
        server.add(export)
        driver = await NbdDriver.open(Target(address), tasks, read_only=False, auto_read_only=False)
        model = sparse_content() + bytes(driver.size_bytes - FILE_BYTES)
        return Subject(driver, model, fixed_size=True, close=server.close)

    return connect


#: A subject that needs a nursery.
LaterSubject = Callable[[trio.Nursery], Awaitable[Subject]]
Maker = Callable[[ExitStack, Path], Subject | LaterSubject]


async def qcow2(
    directory: Path, options: ImageOptions, *, backing_bytes: int | None = None
) -> Subject:
    """An image with the usual content: its own, or where it has a backing file, that one's."""
    file = Node("file", open_new(directory / "image"))
    backing = data_file = None
    content = sparse_content(options.size_bytes)
    if backing_bytes is not None:
        below = MemoryDriver(sparse_content(backing_bytes))
        below.filename = str(directory / "backing.raw")
        backing = Node("backing", below)
        options = replace(options, backing_file="backing.raw", backing_format="raw")
        content = bytearray(bytes(content[:backing_bytes]).ljust(options.size_bytes, b"\0"))
    if options.data_file is not None:
        data_file = Node("data", open_new(directory / options.data_file))
    await create_image(file, options, data_file)
    image = await open_qcow2(
        file, await read_header(file), backing=backing, data_file=data_file, discard_freed=True
    )
    driver = Qcow2Driver(image, direct=False, flushes=True, unmap=True)
    if backing is None:
        for offset, length in DATA_RUNS:
            piece = memoryview(content)[offset : offset + length]
            await driver.write(offset, piece)
    return Subject(driver, content)


def open_new(path: Path) -> FileDriver:
    path.touch()
    return open_image(path)


def qcow2_maker(options: ImageOptions, backing_bytes: int | None = None) -> Maker:
    return lambda _, path: lambda _: qcow2(path, options, backing_bytes=backing_bytes)


#: Whole sectors, and no whole cluster.
IMAGE_BYTES = 300_032
IMAGE = ImageOptions(size_bytes=IMAGE_BYTES)

SUBJECTS: dict[str, Maker] = {
    "file": lambda stack, path: stack.enter_context(file(path)),
    "file-no-unmap": lambda stack, path: stack.enter_context(file(path, unmap=False)),
    "file-direct": lambda stack, path: stack.enter_context(file(path, direct=True)),
    "file-tmpfs": lambda stack, path: stack.enter_context(memory_file(path)),
    "file-tmpfs-direct": lambda stack, path: stack.enter_context(memory_file(path, direct=True)),
    "device": lambda stack, path: stack.enter_context(device(path)),
    "device-direct": lambda stack, path: stack.enter_context(device(path, direct=True)),
    "device-4k-direct": lambda stack, path: stack.enter_context(
        device(path, direct=True, sector_bytes=4096)
    ),
    "raw": lambda stack, path: stack.enter_context(raw(path)),
    "raw-window": lambda stack, path: stack.enter_context(raw(path, offset=1000, size=204_800)),
    "raw-offset": lambda stack, path: stack.enter_context(raw(path, offset=65_536)),
    "blkdebug": lambda stack, path: stack.enter_context(filtered(path, BlkdebugDriver)),
    "throttle": lambda stack, path: stack.enter_context(filtered(path, throttled)),
    "copy-on-read": lambda stack, path: stack.enter_context(copying_on_read(path)),
    "copy-before-write": keeping_an_instant,
    "nbd-qemu": over_qemu_nbd,
    "nbd-nbdkit": lambda stack, path: over_nbdkit(stack, path, block_bytes=1),
    "nbd-old": over_an_old_server,
    "nbd-blockd": over_blockd,
    "nbd-4k-blocks": lambda stack, path: over_nbdkit(stack, path, block_bytes=4096),
    "qcow2": qcow2_maker(IMAGE),
    "qcow2-v2": qcow2_maker(replace(IMAGE, version=2)),
    "qcow2-small-clusters": qcow2_maker(replace(IMAGE, cluster_size_bytes=512, refcount_bits=1)),
    "qcow2-large-clusters": qcow2_maker(
        replace(IMAGE, cluster_size_bytes=2 * limits.MIB, refcount_bits=64)
    ),
    "qcow2-subclusters": qcow2_maker(
        replace(IMAGE, cluster_size_bytes=16 * limits.KIB, extended_l2=True)
    ),
    "qcow2-backing": qcow2_maker(IMAGE, IMAGE_BYTES),
    "qcow2-short-backing": qcow2_maker(IMAGE, 200_192),
    "qcow2-subclusters-backing": qcow2_maker(replace(IMAGE, extended_l2=True), IMAGE_BYTES),
    "qcow2-data-file": qcow2_maker(replace(IMAGE, data_file="data")),
    "qcow2-raw-data-file": qcow2_maker(replace(IMAGE, data_file="data", data_file_raw=True)),
    "memory": lambda stack, path: stack.enter_context(memory(path)),
    "memory-inline": lambda stack, path: stack.enter_context(memory_inline(path)),
}
