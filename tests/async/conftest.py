"""The disks of most tests of backups; whoever needs other ones has them in the test's file."""

from __future__ import annotations

import pytest

from tests.helpers.backup_rig import OLD, SIZE
from tests.helpers.memory_driver import MemoryDriver


@pytest.fixture
def source() -> MemoryDriver:
    return MemoryDriver(OLD)


@pytest.fixture
def target() -> MemoryDriver:
    return MemoryDriver(SIZE)
