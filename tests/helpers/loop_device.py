"""A block device over a file, where the machine lets us have one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.tools import require_tool


@contextmanager
def loop_device(backing: Path, *, sector_bytes: int = 512) -> Iterator[str]:
    """The path of a loop device over ``backing``; skips the test where there can be none."""
    losetup = require_tool("losetup")
    attach = [losetup, "--find", "--show", "--sector-size", str(sector_bytes), str(backing)]
    attached = subprocess.run(attach, capture_output=True, text=True, check=False)
    if attached.returncode != 0:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", device], check=True)
