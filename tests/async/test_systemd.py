"""What the service manager hears, on a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blockd.systemd import ServiceManager


class Manager:
    """The service manager's end: a bound socket, and the environment that names it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.environ = {"NOTIFY_SOCKET": address}

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    manager = Manager(f"@blockd-test-{os.getpid()}" if abstract else str(tmp_path / "notify"))
    yield manager
    manager.close()


def test_the_manager_hears_each_state(manager: Manager) -> None:
    service = ServiceManager(manager.environ)
    service.ready()
    service.stopping()
    assert manager.heard() == ["READY=1", "STOPPING=1"]


async def test_the_watchdog_hears_two_pings_an_interval(
    manager: Manager, autojump_clock: MockClock
) -> None:
    service = ServiceManager({**manager.environ, "WATCHDOG_USEC": "20000000"})
    with trio.move_on_after(95):
        await service.watchdog()
    assert manager.heard() == ["WATCHDOG=1"] * 10


@pytest.mark.parametrize(
    "watch",
    [{}, {"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getppid())}],
    ids=["no watchdog", "somebody else is watched"],
)
async def test_without_a_watchdog_the_task_ends_at_once(
    manager: Manager, watch: dict[str, str]
) -> None:
    await ServiceManager({**manager.environ, **watch}).watchdog()
    assert manager.heard() == []


def test_without_a_manager_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({}).ready()
    assert caplog.records == []


def test_a_manager_that_is_gone_is_logged_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert "cannot tell the service manager READY=1" in caplog.text


def test_a_manager_that_does_not_read_never_holds_up_the_daemon(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    service = ServiceManager(manager.environ)
    queue_limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue_limit + 10):
        service.ready()
    assert 0 < len(manager.heard()) <= queue_limit + 1
    manager.close()
