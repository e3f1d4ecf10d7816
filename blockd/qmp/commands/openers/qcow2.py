"""The opener of qcow2 images, with the chain of backing files that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import trio
from msgspec import UNSET

from blockd.block import Access, Claim, Driver, Node, Role, of_image_file
from blockd.block.qcow2 import (
    BackingImage,
    Header,
    Image,
    Qcow2Driver,
    find_backing,
    open_image,
    read_header,
)
from blockd.errors import BlockdError
from blockd.qmp import arguments
from blockd.qmp.opening import Opening
from blockd.qmp.types.blockdev import (
    BlockdevOptions,
    FileOptions,
    HostDeviceOptions,
    Qcow2Options,
    RawOptions,
)

_NO_BACKING = "Could not open backing file: "


async def open_qcow2(opening: Opening, options: Qcow2Options) -> Driver:
    common = opening.common
    file = await opening.child(Role.FILE, options.file)
    read_only = common.read_only or (common.auto_read_only and file.read_only)
    access = of_image_file(Access(), writable=not read_only)
    # Before the image is repaired, which another node may be writing to.
    with opening.graph.taken(file, Claim(opening.user, Role.FILE, access)):
        image = await _open_image(opening, options, file, read_only=read_only)
        driver = Qcow2Driver(
            image, direct=common.direct, flushes=common.flushes, unmap=common.unmap
        )
        if read_only:
            await trio.to_thread.run_sync(driver.keep_writers_out)
        return driver


async def _open_image(
    opening: Opening, options: Qcow2Options, file: Node, *, read_only: bool
) -> Image:
    with _could_not_open(file):
        header = await read_header(file)
    if options.lazy_refcounts and header.version < 3:
        raise BlockdError(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
        )
    discards = options.pass_discard_request
    backing = await _open_backing(opening, options, header, file.driver.filename)
    data_file = await _open_data_file(opening, options, header, file.driver.filename)
    with _could_not_open(file):
        return await open_image(
            file,
            header,
            backing=backing,
            data_file=data_file,
            read_only=read_only,
            discard_freed=opening.common.unmap if discards is None else discards,
        )


@contextmanager
def _could_not_open(file: Node) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BlockdError(f"Could not open '{file.driver.filename}': {error.strerror}") from error


async def _open_backing(
    opening: Opening, options: Qcow2Options, header: Header, filename: str
) -> Node | None:
    """The node that the options name, or else the one that the image does."""
    reference = options.backing
    if reference is UNSET:
        chain = await trio.to_thread.run_sync(find_backing, filename, header)
        reference = None
        for backing in reversed(chain):
            reference = _backing_options(backing, reference)
    if reference is None:
        return None
    try:
        return await opening.child(Role.BACKING, reference)
    except BlockdError as error:
        if error.message.startswith(_NO_BACKING):
            raise
        raise BlockdError(f"{_NO_BACKING}{error.message}") from error


def _backing_options(image: BackingImage, below: BlockdevOptions | None) -> BlockdevOptions:
    """The options for an image of a chain; ``below`` are those of its own backing file."""
    if image.format == "json":
        return _parse_json(image.filename)
    kind = HostDeviceOptions if image.is_device else FileOptions
    file = kind(filename=image.filename)
    match image.format:
        case "qcow2":
            return Qcow2Options(file=file, backing=below)
        case "raw":
            return RawOptions(file=file)
        case "file" | "host_device":
            return file
        case unknown:
            raise BlockdError(f"{_NO_BACKING}Unknown driver '{unknown}'")


def _parse_json(filename: str) -> BlockdevOptions:
    """The options of a node that QEMU's pseudo-protocol "json:" has."""
    try:
        options = orjson.loads(filename.removeprefix("json:"))
    except orjson.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise BlockdError(f"{_NO_BACKING}Could not parse the JSON options")
    try:
        parsed: BlockdevOptions = arguments.parse(BlockdevOptions, _nested(options))
    except BlockdError as error:
        raise BlockdError(f"{_NO_BACKING}{error.message}") from None
    return parsed


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """With ``{"file": {"filename": ...}}`` for what may also be written "file.filename"."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = _nested(value) if isinstance(value, dict) else value
    return nested


async def _open_data_file(
    opening: Opening, options: Qcow2Options, header: Header, filename: str
) -> Node | None:
    if not header.has_data_file:
        if options.data_file is not None:
            raise BlockdError("'data-file' can only be set for images with an external data file")
        return None
    if options.data_file is not None:
        return await opening.child(Role.DATA_FILE, options.data_file)
    name = header.extensions.data_file
    if name is None:
        raise BlockdError("'data-file' is required for this image")
    path = os.path.join(os.path.dirname(filename), name)
    return await opening.child(Role.DATA_FILE, FileOptions(filename=path))
