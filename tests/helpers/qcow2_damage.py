"""Images with one number in them that can't be right."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.helpers.qcow2 import qemu_img, qemu_io

_COPIED = 1 << 63
_OFFSETS = 0x00FF_FFFF_FFFF_FE00
_WORD = struct.Struct(">Q")
#: Where a version 3 header has the offsets of its tables.
_L1, _REFCOUNT_TABLE = 40, 48

_CLUSTER = 64 * 1024

Damage = Callable[[bytearray], None]


def _word(image: bytearray, at: int) -> int:
    word: int = _WORD.unpack_from(image, at)[0]
    return word


def first_data(image: bytearray) -> None:
    l2 = _word(image, _word(image, _L1)) & _OFFSETS
    _WORD.pack_into(image, l2, _COPIED | (5 * _CLUSTER + 512))


def first_l2_table(image: bytearray) -> None:
    l1 = _word(image, _L1)
    _WORD.pack_into(image, l1, _word(image, l1) + 512)


def first_refcount_block(image: bytearray) -> None:
    table = _word(image, _REFCOUNT_TABLE)
    _WORD.pack_into(image, table, _word(image, table) + 512)


def make_damaged(path: Path, damage: Damage) -> None:
    """Make an image of 3 MiB with its first 256 KiB allocated, and damage it."""
    qemu_img("create", "-f", "qcow2", path, "3M")
    qemu_io(path, "write 0 256k")
    image = bytearray(path.read_bytes())
    damage(image)
    path.write_bytes(image)
