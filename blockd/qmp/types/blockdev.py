"""The options of each driver: what ``blockdev-add`` takes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from blockd.qmp.types.base import Int64, Object


class CacheOptions(Object, kw_only=True):
    """``direct``: I/O passes the page cache by. ``no-flush``: flushes do nothing (data at risk)."""

    direct: bool | None = None
    no_flush: bool | None = None


class NodeOptions(Object, kw_only=True):
    """Make a node: the arguments of ``blockdev-add``, and of a node made along with another.

    ``node-name``: what other commands call it; at most 31 letters, digits, ``-``, ``.``, ``_``,
    a letter first. ``discard``: whether discarded blocks are given back to the storage.
    ``auto-read-only``: fall back to read-only where the image can't be opened for writing.
    A node that is made along with another takes what it does not say itself from that one.
    """

    node_name: str | None = None
    discard: Literal["ignore", "unmap"] | None = None
    cache: CacheOptions | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None


class FileOptions(NodeOptions, tag_field="driver", tag="file", kw_only=True):
    """A regular file."""

    filename: str


class HostDeviceOptions(NodeOptions, tag_field="driver", tag="host_device", kw_only=True):
    """A block device of the host."""

    filename: str


class RawOptions(NodeOptions, tag_field="driver", tag="raw", kw_only=True):
    """An image without a format. ``offset``, ``size``: in bytes, the part of ``file`` it is."""

    file: BlockdevRef
    offset: Int64 | None = None
    size: Int64 | None = None


#: The arguments of ``blockdev-add``: a variant for each driver.
BlockdevOptions = RawOptions | FileOptions | HostDeviceOptions
#: A node by name, or one to be made with the node that needs it.
BlockdevRef = Annotated[str | BlockdevOptions, Meta(title="BlockdevRef")]
#: The same, or null for none, where to leave it out means that the image says which.
BlockdevRefOrNull = Annotated[str | BlockdevOptions | None, Meta(title="BlockdevRefOrNull")]
