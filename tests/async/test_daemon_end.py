"""The end of the daemon, held in its middle: what clients are told, and what may still begin."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import daemon, limits
from blockd.job import Jobs
from blockd.systemd import ServiceManager
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_in_loop import Client

CONTENT = b"c" * 64 * 1024

#: Longer than all takes, so that it only bounds a hang.


class Running:
    """A daemon that waits in the middle of its end until ``finish``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = directory / "disk.img"
        self.ready = trio.Event()
        self.ending = trio.Event()
        self.finish = trio.Event()
        self.ended = trio.Event()
        #: The ids of the jobs that began after the end had begun.
        self.late_jobs: list[str] = []
        self._clients: list[Client] = []

    async def run(self) -> None:
        await daemon.run(str(self.directory / "qmp.sock"))
        self.ended.set()

    async def client(self) -> Client:
        client = Client(await trio.open_unix_socket(str(self.directory / "qmp.sock")))
        self._clients.append(client)
        await client.execute("qmp_capabilities")
        return client

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()


def hold_the_end(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    real_cancel_all, real_admit = Jobs.cancel_all, Jobs.admit

    async def cancel_all(self: Jobs, deadline_seconds: float) -> None:
        running.ending.set()
        await running.finish.wait()
        await real_cancel_all(self, deadline_seconds)

    def admit(self: Jobs, job: Any) -> None:
        if running.ending.is_set():
            running.late_jobs.append(job.id)
        real_admit(self, job)

    monkeypatch.setattr(Jobs, "cancel_all", cancel_all)
    monkeypatch.setattr(Jobs, "admit", admit)
    monkeypatch.setattr(ServiceManager, "ready", lambda _: running.ready.set())
    # It would end this process.
    monkeypatch.setattr(limits, "LAST_RESORT_SECONDS", 100 * PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    """The daemon takes what it finds for its own, for good."""
    yield
    gc.unfreeze()


@asynccontextmanager
async def running_daemon(directory: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A daemon with a disk; it must have ended by the end of the body."""
    running = Running(directory)
    hold_the_end(running, patch)
    running.disk.write_bytes(CONTENT)
    try:
        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(running.run)
                await running.ready.wait()
                client = await running.client()
                disk = {"driver": "file", "node_name": "disk", "filename": str(running.disk)}
                await client.execute("blockdev-add", **disk)
                await client.execute("block-dirty-bitmap-add", node="disk", name="b")
                yield running
                await running.ended.wait()
    finally:
        running.close_clients()


async def by_quit(client: Client) -> None:
    await client.send("quit")


async def by_signal(_: Client) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


End = Callable[[Client], Awaitable[None]]
each_end = pytest.mark.parametrize("end", [by_quit, by_signal])

NEW_FILE = "new.img"
CHANGES: dict[str, dict[str, Any]] = {
    "drive-backup": {"job_id": "late", "device": "disk", "sync": "full", "format": "raw"},
    "blockdev-add": {"driver": "raw", "node_name": "above", "file": "disk"},
    "blockdev-del": {"node_name": "disk"},
    "block-dirty-bitmap-add": {"node": "disk", "name": "c"},
    "block-dirty-bitmap-remove": {"node": "disk", "name": "b"},
    "block-dirty-bitmap-disable": {"node": "disk", "name": "b"},
    "nbd-server-start": {},
}


def arguments_of(command: str, running: Running) -> dict[str, Any]:
    arguments = CHANGES[command]
    if command == "drive-backup":
        return arguments | {"target": str(running.directory / NEW_FILE)}
    if command == "nbd-server-start":
        path = str(running.directory / "nbd.sock")
        return {"addr": {"type": "unix", "data": {"path": path}}}
    return arguments


@each_end
@pytest.mark.parametrize("command", CHANGES)
async def test_nothing_begins_once_the_end_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, end: End
) -> None:
    async with running_daemon(tmp_path, monkeypatch) as running:
        first, second = await running.client(), await running.client()
        await end(first)
        await running.ending.wait()
        await second.send(command, **arguments_of(command, running))
        # So that the command has come to where it is refused, or held back, in the middle.
        await wait_all_tasks_blocked()
        running.finish.set()
        answer = await second.answer()
        assert answer is None or "error" in answer
        assert await second.answer() is None
    assert running.late_jobs == []
    assert running.disk.read_bytes() == CONTENT
    assert {each.name for each in tmp_path.iterdir()} == {"disk.img"}


async def test_a_backup_that_comes_with_the_quit_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client, and both commands in its stream: the second is read after the end."""
    async with running_daemon(tmp_path, monkeypatch) as running:
        running.finish.set()
        client = await running.client()
        await client.send("quit")
        await client.send("drive-backup", **arguments_of("drive-backup", running))
        assert await client.answer() == {"return": {}}
        answer = await client.answer()
        assert answer is None or "error" in answer
    assert running.late_jobs == []
    assert {each.name for each in tmp_path.iterdir()} == {"disk.img"}


@each_end
async def test_all_who_want_the_end_hear_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End
) -> None:
    async with running_daemon(tmp_path, monkeypatch) as running:
        clients = [await running.client() for _ in range(3)]
        await end(clients[0])
        await running.ending.wait()
        for client in clients[1:]:
            await client.send("quit")
        await wait_all_tasks_blocked()
        assert not running.ended.is_set()
        running.finish.set()
        for client in clients:
            answer = await client.answer()
            assert answer in ({"return": {}}, None)
            assert answer is None or await client.answer() is None


@each_end
async def test_the_disk_is_flushed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End
) -> None:
    flushed: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    async with running_daemon(tmp_path, monkeypatch) as running:
        client = await running.client()
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        running.finish.set()
        await end(client)
        await running.ended.wait()
    assert str(running.disk) in flushed
