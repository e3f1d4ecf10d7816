"""blockdev-create."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass

import trio

from blockd import limits
from blockd.block import Graph, Node, create_file
from blockd.block.qcow2 import CompressionType, ImageOptions, Preallocation, create_image
from blockd.errors import BlockdError
from blockd.job import Group, OneStepJob
from blockd.qmp.commands.openers import OPENERS
from blockd.qmp.opening import open_node
from blockd.qmp.services import Services
from blockd.qmp.types.blockdev import BlockdevOptions
from blockd.qmp.types.create import BlockdevCreate, CreateFile, CreateQcow2

_ZEROES = memoryview(bytes(limits.MIB))


async def blockdev_create(services: Services, arguments: BlockdevCreate) -> None:
    options, graph = arguments.options, services.graph
    match options:
        case CreateFile():
            job = OneStepJob(arguments.job_id, "create", lambda: _create_file(graph, options))
        case CreateQcow2():
            job = OneStepJob(arguments.job_id, "create", lambda: _create_qcow2(graph, options))
        case _:
            raise BlockdError("Driver does not support blockdev-create")
    try:
        services.jobs.admit(job)
    except BlockdError:
        await job.give_up()
        raise
    services.jobs.begin([Group([job], nullcontext)])


async def _create_file(graph: Graph, options: CreateFile) -> None:
    size_bytes, preallocation = _signed(options.size), options.preallocation
    if preallocation == "metadata":
        raise BlockdError(f"Unsupported preallocation mode: {preallocation}")
    if size_bytes < 0:
        raise BlockdError(f"Could not resize file: {os.strerror(errno.EINVAL)}")
    file = await trio.to_thread.run_sync(
        create_file, options.filename.removeprefix("file:"), size_bytes
    )
    driver, done = file.driver, False
    try:
        graph.check_storage(driver)
        await driver.make_empty()
        if preallocation == "full":
            for offset in range(0, size_bytes, len(_ZEROES)):
                await driver.write(offset, _ZEROES[: size_bytes - offset])
        elif preallocation == "falloc" and size_bytes:
            await driver.write_zeroes(0, size_bytes, unmap=False)
        await driver.flush()
        done = True
    finally:
        with trio.CancelScope(shield=True):
            await driver.close()
            if not done:
                await trio.to_thread.run_sync(file.remove)


async def _create_qcow2(graph: Graph, options: CreateQcow2) -> None:
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(_held(graph, options.file))
        data_file = None
        if options.data_file is not None:
            data_file = await stack.enter_async_context(_held(graph, options.data_file))
        await create_image(file, _image_options(options, data_file), data_file)


def _image_options(options: CreateQcow2, data_file: _Held | None) -> ImageOptions:
    return ImageOptions(
        size_bytes=_signed(options.size),
        version=2 if options.version == "v2" else 3,
        cluster_size_bytes=options.cluster_size,
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
        preallocation=Preallocation(options.preallocation),
        lazy_refcounts=options.lazy_refcounts,
        refcount_bits=options.refcount_bits,
        data_file=None if data_file is None else data_file.node.driver.filename,
        data_file_raw=options.data_file_raw,
        extended_l2=options.extended_l2,
        compression_type=CompressionType[options.compression_type.upper()],
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """A node that an image is made in; those that stand on it follow its size."""

    graph: Graph
    node: Node

    @property
    def size_bytes(self) -> int:
        return self.node.size_bytes

    async def resize(self, size_bytes: int) -> None:
        await self.graph.resize_held(self.node, size_bytes)

    async def write(self, offset: int, view: memoryview) -> None:
        await self.node.write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.node.write_zeroes(offset, length, unmap=unmap)

    async def flush(self) -> None:
        await self.node.flush()


@asynccontextmanager
async def _held(graph: Graph, reference: str | BlockdevOptions) -> AsyncIterator[_Held]:
    """A node to make an image in; one that is made for it goes afterwards."""
    if isinstance(reference, str):
        node = graph.get(reference, device=reference)
    else:
        node = await open_node(OPENERS, graph, reference, owned=False)
    try:
        hold = graph.hold_to_fill(node)
        try:
            yield _Held(graph, node)
        finally:
            hold.release()
    finally:
        if not isinstance(reference, str):
            with trio.CancelScope(shield=True):
                await graph.remove(node)


def _signed(size: int) -> int:
    """A size that QEMU has read with 64 unsigned bits, as it then uses it."""
    return size - (1 << 64) if size >= 1 << 63 else size
