"""The chain of backing files that images name, before any of them is opened as a node."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockd import limits
from blockd.block.drivers.opening import guess_format, is_block_device
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.parsing import HEADER_BYTES, parse_header
from blockd.errors import BlockdError


@dataclass(frozen=True, slots=True)
class BackingImage:
    """One backing file, by its path and the format that the image above gives it.

    The last of a chain may be one of format "json", which begins another chain.
    """

    filename: str
    format: str
    is_device: bool


def backing_path(filename: str, name: str) -> str:
    """Where an image at ``filename`` finds the backing file that it calls ``name``.

    A name that begins with "json:" has the options of a node instead of a path, and is left so.
    """
    if name.startswith("json:"):
        return name
    name = name.removeprefix("file:")
    return os.path.join(os.path.dirname(filename), name)


def name_backing(overlay: str, filename: str) -> str:
    """What an image at ``overlay`` calls the backing file at ``filename``, to find it again.

    A relative name is one from the image's own directory.
    """
    if filename.startswith("json:") or os.path.isabs(filename):
        return filename
    same = os.path.realpath(backing_path(overlay, filename))
    return filename if same == os.path.realpath(filename) else os.path.abspath(filename)


def find_backing(filename: str, header: Header) -> list[BackingImage]:
    """The images below the one at ``filename``, the nearest first. Blocks.

    Raises ``BlockdError`` where one can't be read, or names one that was there before.
    """
    chain: list[BackingImage] = []
    seen = {os.path.realpath(filename)}
    while header.backing_file is not None:
        if len(chain) == limits.QCOW2_CHAIN_IMAGES:
            raise BlockdError(f"The backing chain of '{filename}' is too long")
        above = chain[-1].filename if chain else filename
        path = backing_path(above, header.backing_file)
        if path.startswith("json:"):
            chain.append(BackingImage(path, "json", is_device=False))
            break
        if (real := os.path.realpath(path)) in seen:
            raise BlockdError(f"Backing file '{path}' creates an infinite loop.")
        seen.add(real)
        kind = header.extensions.backing_format or guess_format(path)
        chain.append(BackingImage(path, kind, is_block_device(path)))
        if kind != "qcow2":
            break
        header = _read_header(path)
    return chain


def _read_header(path: str) -> Header:
    try:
        with open(path, "rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            return parse_header(file.read(HEADER_BYTES), size_bytes)
    except OSError as error:
        raise BlockdError(
            f"Could not open backing file: Could not open '{path}': {error.strerror}"
        ) from error
