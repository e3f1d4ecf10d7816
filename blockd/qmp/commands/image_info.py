"""What ``query-named-block-nodes`` tells of an image."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from blockd.block import Node
from blockd.block.qcow2 import BitmapEntry, BitmapFlag, Header, Qcow2Driver, backing_path


def backing_depth(node: Node) -> int:
    """How many backing files lie below the node."""
    depth = 0
    while (backing := node.backing) is not None:
        depth, node = depth + 1, backing
    return depth


async def describe_image(node: Node, *, flat: bool) -> dict[str, Any]:
    """The image, and unless ``flat`` inside it the one that it is based on, and so on."""
    top = image = await _describe(node)
    while not flat and (backing := node.backing) is not None:
        image["backing-image"] = await _describe(backing)
        image, node = image["backing-image"], backing
    return top


async def _describe(node: Node) -> dict[str, Any]:
    driver = node.driver
    image: dict[str, Any] = {
        "virtual-size": node.size_bytes,
        "filename": driver.filename,
        "format": driver.name,
        "dirty-flag": False,
    }
    # Deleted meanwhile, or its storage is gone? The rest is known all the same.
    with suppress(OSError):
        image["actual-size"] = await node.allocated_bytes()
    if driver.cluster_size_bytes is not None:
        image["cluster-size"] = driver.cluster_size_bytes
    if driver.name == "file":
        image["format-specific"] = {"type": "file", "data": {}}
    if isinstance(driver, Qcow2Driver):
        image |= _describe_qcow2(driver)
    return image


def _describe_qcow2(driver: Qcow2Driver) -> dict[str, Any]:
    header = driver.header
    specific = _describe_header(header)
    if bitmaps := [_describe_bitmap(entry) for entry in driver.bitmap_store.entries]:
        specific["bitmaps"] = bitmaps
    image: dict[str, Any] = {
        "dirty-flag": driver.found_dirty,
        "format-specific": {"type": "qcow2", "data": specific},
    }
    if header.backing_file is not None:
        image["backing-filename"] = header.backing_file
        image["full-backing-filename"] = backing_path(driver.file_name, header.backing_file)
        if header.extensions.backing_format is not None:
            image["backing-filename-format"] = header.extensions.backing_format
    return image


def _describe_bitmap(entry: BitmapEntry) -> dict[str, Any]:
    names = {BitmapFlag.IN_USE: "in-use", BitmapFlag.AUTO: "auto"}
    return {
        "name": entry.name,
        "granularity": entry.granularity_bytes,
        "flags": [name for flag, name in names.items() if flag in entry.flags],
    }


def _describe_header(header: Header) -> dict[str, Any]:
    described: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": header.compression_type.name.lower(),
        "refcount-bits": header.refcount_bits,
    }
    if header.version == 2:
        return described
    described["lazy-refcounts"] = header.lazy_refcounts
    described["corrupt"] = header.corrupt
    described["extended-l2"] = header.extended_l2
    if header.has_data_file:
        described["data-file"] = header.extensions.data_file
        described["data-file-raw"] = header.data_file_raw
    return described
