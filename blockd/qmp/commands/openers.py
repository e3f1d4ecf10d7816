"""The opener of each driver."""

from __future__ import annotations

import trio

from blockd.block import SECTOR_BYTES, Driver, RawDriver, Role, open_file
from blockd.errors import BlockdError
from blockd.qmp.opening import Openers, Opening
from blockd.qmp.types.blockdev import FileOptions, HostDeviceOptions, RawOptions


async def _open_file(opening: Opening, options: FileOptions | HostDeviceOptions) -> Driver:
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


async def _open_raw(opening: Opening, options: RawOptions) -> Driver:
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


OPENERS: Openers = {
    FileOptions: _open_file,
    HostDeviceOptions: _open_file,
    RawOptions: _open_raw,
}
