"""Images that blockdev-create makes in a running daemon, as qemu-img sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.qcow2 import check, format_info, options, qemu_img
from tests.helpers.qmp_client import QmpClient

MIB = 1 << 20


def create(client: QmpClient, **image: Any) -> str | None:
    """Make an image; the error where that failed."""
    named = {name.replace("_", "-"): value for name, value in image.items()}
    client.execute("blockdev-create", {"job-id": "j", "options": named})
    client.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    (job,) = client.execute("query-jobs")
    client.execute("job-dismiss", {"id": "j"})
    error: str | None = job.get("error")
    return error


def add_file(client: QmpClient, name: str, path: Path) -> None:
    assert create(client, driver="file", filename=str(path), size=0) is None
    node = {"driver": "file", "node-name": name, "filename": str(path)}
    client.execute("blockdev-add", node)


@pytest.mark.parametrize(
    ("image", "theirs"),
    [
        ({}, []),
        ({"version": "v2", "cluster_size": 4096}, ["compat=v2", "cluster_size=4096"]),
        (
            {"extended_l2": True, "lazy_refcounts": True, "refcount_bits": 64},
            ["extended_l2=on", "lazy_refcounts=on", "refcount_bits=64"],
        ),
        (
            {"backing_file": "b", "backing_fmt": "raw", "compression_type": "zstd"},
            ["backing_file=b", "backing_fmt=raw", "compression_type=zstd"],
        ),
        ({"preallocation": "falloc"}, ["preallocation=falloc"]),
    ],
)
def test_images_are_those_of_qemu_img(
    daemon: Daemon, tmp_path: Path, image: dict[str, Any], theirs: list[str]
) -> None:
    (tmp_path / "b").write_bytes(bytes(MIB))
    path = tmp_path / "image"
    with QmpClient(daemon.qmp_path) as client:
        add_file(client, "f", path)
        assert create(client, driver="qcow2", file="f", size=8 * MIB, **image) is None
        client.execute("blockdev-del", {"node-name": "f"})
    peer = tmp_path / "theirs"
    qemu_img("create", "-f", "qcow2", *options(*theirs), peer, str(8 * MIB))
    assert format_info(path) == format_info(peer)
    check(path)


def test_a_data_file_shows_its_content_in_the_image(daemon: Daemon, tmp_path: Path) -> None:
    path, data = tmp_path / "image", tmp_path / "data"
    data.write_bytes(b"d" * MIB)
    with QmpClient(daemon.qmp_path) as client:
        add_file(client, "f", path)
        file = {"driver": "file", "filename": str(data)}
        image = {"data_file": file, "data_file_raw": True}
        assert create(client, driver="qcow2", file="f", size=2 * MIB, **image) is None
        client.execute("blockdev-del", {"node-name": "f"})
    check(path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", data, path)
    assert data.read_bytes() == b"d" * MIB + bytes(MIB)


def test_a_file_that_cannot_be_made_whole_is_not_left(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "new"
    with QmpClient(daemon.qmp_path) as client:
        error = create(client, driver="file", filename=str(path), size=(1 << 63) - 512)
    assert error == "File too large"
    assert not path.exists()
