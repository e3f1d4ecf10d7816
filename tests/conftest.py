"""Fixtures that more than one kind of test uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings

from tests.helpers.backup_rig import use_small_limits
from tests.helpers.daemon import Daemon

# How long an example takes says something about the machine's other work, not about blockd.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture
def daemon_options() -> list[str]:
    """Of the daemon's command line, beside ``--qmp``."""
    return []


@pytest.fixture
def daemon(tmp_path: Path, daemon_options: list[str]) -> Iterator[Daemon]:
    """A running daemon. It must end in order, unless the test ends it, and log no traceback."""
    daemon = Daemon(tmp_path, options=daemon_options)
    daemon.start()
    yield daemon
    status = daemon.terminate() if daemon.running else 0
    log = daemon.log()
    assert status == 0, log
    assert "Traceback" not in log, log


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test leaves as many descriptors open as it found."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def small_backup_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups in pieces so small that a few KiB take many of them."""
    use_small_limits(monkeypatch)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is such a thing: for tests that sync again and again, but
    cut no real power.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with TemporaryDirectory(dir=memory, prefix="blockd-test-") as directory:
        yield Path(directory)
