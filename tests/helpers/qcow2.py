"""QEMU's tools on images; and qcow2 images for tests, made here or by qemu-img."""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tools import require_tool


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img; what it prints. Where it fails, so does the test."""
    command = [require_tool("qemu-img"), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def qemu_io(image: Path, *commands: str, driver: str = "qcow2") -> str:
    """Run qemu-io on an image; what it prints. Where it fails, so does the test."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    result = subprocess.run(
        [require_tool("qemu-io"), "-f", driver, *arguments, str(image)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def options(*each: str) -> list[str]:
    return [argument for option in each for argument in ("-o", option)]


def check(image: Path) -> dict[str, Any]:
    """What ``qemu-img check`` says of an image; errors and leaks fail the test."""
    checked: dict[str, Any] = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", image))
    assert not checked["check-errors"]
    return checked


def qemu_img_check(image: Path) -> dict[str, int]:
    """How many errors and leaks qemu-img finds in an image."""
    command = [require_tool("qemu-img"), "check", "-f", "qcow2", "--output=json", str(image)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    checked = json.loads(result.stdout)
    assert not checked["check-errors"], result.stderr
    return {kind: checked.get(kind, 0) for kind in ("corruptions", "leaks")}


def format_info(image: Path) -> dict[str, Any]:
    """What ``qemu-img info`` says of an image, but for what depends on its storage and name."""
    info: dict[str, Any] = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", image))
    for key in ("actual-size", "filename", "children", "full-backing-filename"):
        info.pop(key, None)
    return info


@dataclass
class FileStorage:
    """A regular file as what an image is made in, with a disk cache that a power cut can lose.

    ``steps_left``: the power is cut instead of the call after so many; of what was written since
    the last flush, any part may have reached the disk.
    """

    path: Path
    steps_left: int | None = None
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self.size_bytes = os.fstat(self._fd).st_size
        self._cached: list[tuple[int, bytes]] = []

    def close(self) -> None:
        self._write_back(self._cached)
        os.close(self._fd)

    def _step(self) -> None:
        if self.steps_left is None:
            return
        if not self.steps_left:
            chance = random.Random(len(self._cached))
            self._cached = [each for each in self._cached if chance.random() < 0.5]
            raise PowerCutError
        self.steps_left -= 1

    def _write_back(self, writes: list[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            os.pwrite(self._fd, data, offset)
        self._cached = []

    async def resize(self, size_bytes: int) -> None:
        self._step()
        os.ftruncate(self._fd, size_bytes)
        self.size_bytes = size_bytes

    async def write(self, offset: int, view: memoryview) -> None:
        self._step()
        assert offset + len(view) <= self.size_bytes
        self._cached.append((offset, bytes(view)))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.write(offset, memoryview(bytes(length)))

    async def flush(self) -> None:
        self._step()
        self._write_back(self._cached)


class PowerCutError(Exception):
    """Nothing from this step on happened."""
