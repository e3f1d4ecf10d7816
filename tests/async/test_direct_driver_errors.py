"""O_DIRECT, and a disk that fails: the NBD client is told, and nothing else changes."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from blockd.block.drivers.direct import DirectFileDriver
from blockd.nbd.wire import Errno
from tests.helpers.driver_subjects import open_image
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import NbdError
from tests.helpers.nbd_server import in_thread, serving

BLOCK = 4096
CONTENT = bytes(range(256)) * (16 * BLOCK // 256)
DATA = b"n" * BLOCK


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
async def client(tmp_path: Path, path: Path) -> AsyncIterator[NbdClient]:
    driver = open_image(path, direct=True)
    assert isinstance(driver, DirectFileDriver)
    # As on a disk with such sectors, whatever this one has.
    driver._alignment_bytes = BLOCK
    async with serving(tmp_path) as rig:
        node = rig.graph.add("disk", driver, owned=True)
        rig.export(node)
        yield await rig.client()
    await driver.close()


class BrokenCall:
    """Stands for ``real``: after so many calls that do their work, all fail with EIO."""

    def __init__(self, real: Any, *, good_calls: int = 0, most_bytes: int | None = None) -> None:
        """``most_bytes``: what a good call writes at most."""
        self._real = real
        self._good_calls = good_calls
        self._most_bytes = most_bytes

    def __call__(self, fd: int, data: Any, offset: int) -> int:
        if not self._good_calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._good_calls -= 1
        if self._most_bytes is not None:
            data = data[: self._most_bytes]
        count: int = self._real(fd, data, offset)
        return count


async def fails(call: Any, *arguments: Any) -> Errno | int:
    def run() -> Errno | int:
        with pytest.raises(NbdError) as raised:
            call(*arguments)
        return raised.value.code

    return await in_thread(run)


@pytest.mark.parametrize(("offset", "length"), [(0, BLOCK), (10, 1), (BLOCK - 1, BLOCK + 2)])
async def test_a_read_that_fails(
    client: NbdClient, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", BrokenCall(os.preadv))
        assert await fails(client.read, offset, length) == Errno.EIO
    assert await in_thread(lambda: client.read(offset, length)) == CONTENT[offset : offset + length]


@pytest.mark.parametrize("good_reads", [0, 1])
async def test_a_write_that_can_not_read_the_rest_of_its_blocks(
    client: NbdClient, path: Path, monkeypatch: pytest.MonkeyPatch, good_reads: int
) -> None:
    """It covers its first and its last block in part, so it reads two."""
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", BrokenCall(os.preadv, good_calls=good_reads))
        assert await fails(client.write, 10, DATA) == Errno.EIO
    assert path.read_bytes() == CONTENT
    await in_thread(lambda: client.write(10, DATA))
    assert path.read_bytes() == CONTENT[:10] + DATA + CONTENT[10 + BLOCK :]


@pytest.mark.parametrize(("offset", "length"), [(0, BLOCK), (10, 1), (10, BLOCK)])
async def test_a_write_that_fails(
    client: NbdClient, path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", BrokenCall(os.pwrite))
        assert await fails(client.write, offset, DATA[:length]) == Errno.EIO
    assert path.read_bytes() == CONTENT


async def test_a_write_of_which_the_disk_takes_only_a_part(
    client: NbdClient, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", BrokenCall(os.pwrite, good_calls=1, most_bytes=BLOCK))
        assert await fails(client.write, 0, DATA * 2) == Errno.EIO
    assert path.read_bytes() == DATA + CONTENT[BLOCK:]
