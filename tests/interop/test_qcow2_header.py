"""qcow2 headers: those that qemu-img writes, and damaged ones, refused in its words."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.block.qcow2.extensions import ExtensionType
from blockd.block.qcow2.parsing import HEADER_BYTES, parse_header
from blockd.errors import BlockdError
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qcow2 import qemu_img
from tests.helpers.tools import require_tool


def create(path: Path, *options: str, size: str = "1G") -> Path:
    arguments = [argument for option in options for argument in ("-o", option)]
    qemu_img("create", "-f", "qcow2", *arguments, path, size)
    return path


def beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["compat=v2"],
        ["cluster_size=512"],
        ["cluster_size=4k", "backing_file=base", "backing_fmt=raw"],
        ["cluster_size=2M"],
        ["refcount_bits=1"],
        ["refcount_bits=64", "lazy_refcounts=on"],
        ["extended_l2=on", "cluster_size=16k"],
        ["compression_type=zstd"],
        ["data_file=data.raw"],
        ["data_file=data.raw", "data_file_raw=on"],
        ["backing_file=base", "backing_fmt=raw"],
        ["preallocation=metadata"],
    ],
    ids=" ".join,
)
def test_what_qemu_writes_is_read_and_written_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    image = create(tmp_path / "image", *options)
    data = beginning(image)
    header = parse_header(data, image.stat().st_size)
    assert header.size_bytes == 1 << 30
    assert header.build() == data[: header.cluster_size_bytes].ljust(
        header.cluster_size_bytes, b"\0"
    )
    assert header.for_writing() == header


def test_bitmaps_and_snapshots_of_qemu_are_found(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    qemu_img("bitmap", "--add", image, "b0")
    qemu_img("snapshot", "-c", "s0", image)
    data = beginning(image)
    header = parse_header(data, image.stat().st_size)
    assert header.extensions.bitmaps is not None
    assert header.extensions.bitmaps.nb_bitmaps == 1
    assert header.nb_snapshots == 1
    assert header.build() == data[: header.cluster_size_bytes]


_Damage = Callable[[bytearray], None]


def put(form: str, offset: int, *values: int) -> _Damage:
    def damage(image: bytearray) -> None:
        struct.pack_into(f">{form}", image, offset, *values)

    return damage


def both(*damages: _Damage) -> _Damage:
    def damage(image: bytearray) -> None:
        for each in damages:
            each(image)

    return damage


def extension(kind: int, data: bytes, *, length: int | None = None) -> _Damage:
    """One extension, and the end mark, in place of all."""

    def damage(image: bytearray) -> None:
        size = len(data) if length is None else length
        area = struct.pack(">II", kind, size) + data + bytes(-len(data) % 8) + bytes(8)
        image[112 : 112 + len(area)] = area

    return damage


def bitmaps(*fields: int) -> _Damage:
    directory = extension(ExtensionType.BITMAPS, struct.pack(">IIQQ", *fields))
    return both(put("Q", 88, 1), directory)


NAMES = struct.pack(">BB46s", 0, 40, b"sharding") + struct.pack(">BB46s", 1, 41, b"not this one")

#: What is refused in QEMU's words.
DAMAGED: dict[str, _Damage] = {
    "magic": put("I", 0, 0x514649FC),
    "version 1": put("I", 4, 1),
    "version 4": put("I", 4, 4),
    "clusters too small": put("I", 20, 8),
    "clusters too large": put("I", 20, 22),
    "clusters absurd": put("I", 20, 0xFFFFFFFF),
    "header too short": put("I", 100, 96),
    "header too long": put("I", 100, 65544),
    "backing file far away": put("QI", 8, 65537, 4),
    "backing file name too long": put("QI", 8, 1024, 1024),
    "backing file name over the cluster's end": put("QI", 8, 65530, 8),
    "unknown incompatible features": put("Q", 72, 1 << 40 | 1 << 41),
    "incompatible feature with a name": both(
        put("Q", 72, 1 << 40 | 1 << 41), extension(ExtensionType.FEATURE_NAMES, NAMES)
    ),
    "unknown compression type": both(put("Q", 72, 8), put("B", 104, 2)),
    "compression type without its bit": put("B", 104, 1),
    "compression bit without a type": put("Q", 72, 8),
    "subclusters too small": both(put("Q", 72, 16), put("I", 20, 13)),
    "refcounts too wide": put("I", 96, 7),
    "no refcount table": put("I", 56, 0),
    "refcount table too large": put("I", 56, 129),
    "refcount table not aligned": put("Q", 48, 65536 + 512),
    "refcount table at an absurd offset": put("Q", 48, 0xFFFFFFFFFFFF0000),
    "snapshot table too large": put("I", 60, 65537),
    "snapshot table not aligned": put("IQ", 60, 1, 0x10008),
    "L1 table too large": put("I", 36, (32 << 20) // 8 + 1),
    "L1 table too small": put("I", 36, 1),
    "L1 table not aligned": put("Q", 40, 0x30008),
    "size too large": put("Q", 24, 1 << 62),
    "extension too large": extension(0x12345678, b"", length=65536),
    "extension's length absurd": extension(0x12345678, b"", length=0xFFFFFFFF),
    "extension cut by the backing file's name": both(
        extension(0x12345678, bytes(16)), put("QI", 8, 116, 4)
    ),
    "backing format too long": extension(ExtensionType.BACKING_FORMAT, b"x" * 16),
    "crypto header": extension(ExtensionType.CRYPTO, bytes(16)),
    "bitmaps of a wrong length": both(put("Q", 88, 1), extension(ExtensionType.BITMAPS, bytes(16))),
    "bitmaps with a reserved field": bitmaps(1, 1, 32, 0x40000),
    "no bitmaps": bitmaps(0, 0, 32, 0x40000),
    "too many bitmaps": bitmaps(65536, 0, 32, 0x40000),
    "bitmap directory not aligned": bitmaps(1, 0, 32, 0x40008),
    "bitmap directory too large": bitmaps(1, 0, 1024 * 65535 + 1, 0x40000),
    "raw data file without a data file": put("Q", 88, 2),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_refused_in_the_words_of_qemu(tmp_path: Path, damage: _Damage) -> None:
    path = create(tmp_path / "image")
    image = bytearray(path.read_bytes())
    damage(image)
    path.write_bytes(image)
    result = subprocess.run(
        [require_tool("qemu-io"), "-r", "-f", "qcow2", "-c", "quit", str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    refusal = result.stderr.strip().removeprefix(f"qemu-io: can't open device {path}: ")
    assert refusal
    with pytest.raises(BlockdError) as refused:
        parse_header(bytes(image), len(image))
    assert refused.value.message == refusal
