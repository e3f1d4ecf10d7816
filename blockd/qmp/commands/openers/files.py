"""The openers of the drivers that stand on storage, or pretend to."""

from __future__ import annotations

import trio

from blockd.block import SECTOR_BYTES, Driver, NullDriver, RawDriver, Role, open_file
from blockd.errors import BlockdError
from blockd.qmp.opening import Opening
from blockd.qmp.types.blockdev import FileOptions, HostDeviceOptions, NullOptions, RawOptions


async def open_storage(opening: Opening, options: FileOptions | HostDeviceOptions) -> Driver:
    common = opening.common
    return await trio.to_thread.run_sync(
        lambda: open_file(
            options.filename,
            driver="file" if isinstance(options, FileOptions) else "host_device",
            read_only=common.read_only,
            auto_read_only=common.auto_read_only,
            direct=common.direct,
            unmap=common.unmap,
            flushes=common.flushes,
        )
    )


async def open_raw(opening: Opening, options: RawOptions) -> Driver:
    common = opening.common
    child = await opening.child(Role.FILE, options.file)
    for name, value in (("offset", options.offset), ("size", options.size)):
        if value is not None and value < 0:
            raise BlockdError(f"Value '{value}' is out of range for parameter '{name}'")
    if options.size is not None and options.size % SECTOR_BYTES:
        raise BlockdError("Specified size is not multiple of 512")
    return RawDriver(
        child,
        read_only=common.read_only or (common.auto_read_only and child.read_only),
        offset_bytes=options.offset or 0,
        size_bytes=options.size,
        direct=common.direct,
        flushes=common.flushes,
        unmap=common.unmap,
    )


async def open_null(opening: Opening, options: NullOptions) -> Driver:
    if options.size is not None and options.size < 0:
        raise BlockdError(f"Value '{options.size}' is out of range for parameter 'size'")
    return NullDriver(
        options.size,
        latency_ns=options.latency_ns,
        read_zeroes=options.read_zeroes,
        read_only=opening.common.read_only,
    )
