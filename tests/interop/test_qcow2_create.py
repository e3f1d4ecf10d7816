"""New qcow2 images are what qemu-img makes of the same options, and nothing by halves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blockd.block.qcow2.create import create_image
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.image_options import ImageOptions, Preallocation
from tests.helpers.qcow2 import (
    FileStorage,
    PowerCutError,
    check,
    format_info,
    options,
    qemu_img,
    qemu_io,
)

MIB = 1 << 20

#: Our options, and qemu-img's for the same.
CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"size_bytes": 0}, []),
    ({"size_bytes": 512}, []),
    ({"size_bytes": 1 << 45}, []),
    ({"version": 2}, ["compat=v2"]),
    ({"cluster_size_bytes": 512}, ["cluster_size=512"]),
    ({"cluster_size_bytes": 512, "size_bytes": 1 << 37}, ["cluster_size=512"]),
    ({"cluster_size_bytes": 2 * MIB}, ["cluster_size=2M"]),
    ({"lazy_refcounts": True}, ["lazy_refcounts=on"]),
    *(({"refcount_bits": 1 << n}, [f"refcount_bits={1 << n}"]) for n in range(7)),
    ({"compression_type": CompressionType.ZSTD}, ["compression_type=zstd"]),
    ({"extended_l2": True}, ["extended_l2=on"]),
    ({"backing_file": "base", "backing_format": "raw"}, ["backing_file=base", "backing_fmt=raw"]),
    ({"preallocation": Preallocation.METADATA}, ["preallocation=metadata"]),
    ({"preallocation": Preallocation.FALLOC}, ["preallocation=falloc"]),
    ({"preallocation": Preallocation.FULL, "version": 2}, ["preallocation=full", "compat=v2"]),
    *(
        (
            {
                "preallocation": Preallocation.METADATA,
                "refcount_bits": 1 << n,
                "cluster_size_bytes": 512,
                "size_bytes": 3 * MIB + 512,
            },
            ["preallocation=metadata", f"refcount_bits={1 << n}", "cluster_size=512"],
        )
        for n in range(7)
    ),
    (
        {
            "preallocation": Preallocation.METADATA,
            "extended_l2": True,
            "backing_file": "base",
            "backing_format": "raw",
        },
        ["preallocation=metadata", "extended_l2=on", "backing_file=base", "backing_fmt=raw"],
    ),
    ({"data_file": "data"}, ["data_file=data"]),
    ({"data_file": "data", "data_file_raw": True}, ["data_file=data", "data_file_raw=on"]),
    (
        {"data_file": "data", "preallocation": Preallocation.FULL},
        ["data_file=data", "preallocation=full"],
    ),
]


def names(case: tuple[dict[str, Any], list[str]]) -> str:
    return f"{case[0].get('size_bytes', '')} {' '.join(case[1])}"


async def make(path: Path, image: ImageOptions, *, steps: int | None = None) -> None:
    file = FileStorage(path, steps)
    data = None if image.data_file is None else FileStorage(path.parent / image.data_file)
    try:
        await create_image(file, image, data)
    finally:
        file.close()
        if data is not None:
            data.close()


@pytest.mark.parametrize("case", CASES, ids=names)
async def test_same_as_qemu_img(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[dict[str, Any], list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    image = ImageOptions(**({"size_bytes": 8 * MIB} | case[0]))
    (tmp_path / "base").write_bytes(random.Random(1).randbytes(MIB))
    qemu_img("create", "-f", "qcow2", *options(*case[1]), "theirs", str(image.size_bytes))
    await make(tmp_path / "ours", image)
    ours, theirs = Path("ours"), Path("theirs")
    assert format_info(ours) == format_info(theirs)
    allocated = "allocated-clusters"
    assert check(ours).get(allocated) == check(theirs).get(allocated)
    if image.size_bytes <= 8 * MIB:
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs")


@pytest.mark.parametrize("case", CASES, ids=names)
async def test_qemu_writes_to_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[dict[str, Any], list[str]]
) -> None:
    """What the allocator needs next lies where it looks for it."""
    monkeypatch.chdir(tmp_path)
    image = ImageOptions(**({"size_bytes": 8 * MIB} | case[0]))
    if image.size_bytes < MIB:
        return
    (tmp_path / "base").write_bytes(random.Random(1).randbytes(MIB))
    await make(tmp_path / "ours", image)
    last = min(image.size_bytes, 1 << 36) - MIB
    qemu_io(Path("ours"), "write -P 7 0 1M", f"write -P 8 {last} 1M")
    qemu_io(Path("ours"), "read -P 7 0 1M", f"read -P 8 {last} 1M")
    check(Path("ours"))


@pytest.mark.parametrize("preallocation", list(Preallocation))
async def test_over_an_older_image_nothing_of_it_is_seen(
    tmp_path: Path, preallocation: Preallocation
) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, "16M")
    qemu_io(path, "write -P 5 0 16M")
    await make(path, ImageOptions(8 * MIB, preallocation=preallocation))
    check(path)
    qemu_io(path, "read -P 0 0 8M")


async def test_a_power_cut_leaves_no_image_or_a_whole_one(tmp_path: Path) -> None:
    """Over an older image too: none of its tables is taken for one of the new image."""
    image = ImageOptions(8 * MIB, preallocation=Preallocation.METADATA)
    path = tmp_path / "image"
    steps, done = 0, False
    while not done:
        qemu_img("create", "-f", "qcow2", path, "4M")
        qemu_io(path, "write -P 5 0 4M")
        try:
            await make(path, image, steps=steps)
            done = True
        except PowerCutError:
            steps += 1
        if path.read_bytes()[:4] == b"QFI\xfb":
            check(path)
    assert steps > 5
