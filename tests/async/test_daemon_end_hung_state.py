"""The end of the daemon while its state directory hangs: guests' data is flushed all the same."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from blockd import daemon
from blockd.state.database import Database
from blockd.systemd import ServiceManager
from tests.helpers.nbd_client import NbdClient
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_in_loop import Client

MIB = 1024 * 1024
DISK_BYTES = 64 * MIB
DATA = b"d" * 4096


class LastResort:
    """In the place of the timer, which the test lets go off."""

    def __init__(self, _seconds: float, _exit: Callable[[], None]) -> None:
        self.daemon = False

    def start(self) -> None:
        """The test is the clock."""

    def cancel(self) -> None:
        """As above."""


class Running:
    """A daemon with an exported disk that has a persistent bitmap."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = directory / "disk.img"
        self.ready, self.ended = trio.Event(), trio.Event()
        #: Commits go on; one has come while they don't; the disk has been flushed.
        self.go, self.hung, self.flushed = threading.Event(), threading.Event(), threading.Event()
        self.go.set()

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        commit, fdatasync = Database.commit, os.fdatasync

        def hanging_commit(database: Database, changes: Any) -> None:
            if not self.go.is_set():
                self.hung.set()
                self.go.wait()
            commit(database, changes)

        def watched_fdatasync(fd: int) -> None:
            fdatasync(fd)
            if os.readlink(f"/proc/self/fd/{fd}") == str(self.disk):
                self.flushed.set()

        patch.setattr(Database, "commit", hanging_commit)
        patch.setattr(os, "fdatasync", watched_fdatasync)
        patch.setattr(ServiceManager, "ready", lambda _: self.ready.set())
        patch.setattr(daemon, "threading", SimpleNamespace(Timer=LastResort))

    async def run(self) -> None:
        await daemon.run(str(self.directory / "qmp.sock"), None, str(self.directory / "state"))
        self.ended.set()

    async def client(self) -> Client:
        client = Client(await trio.open_unix_socket(str(self.directory / "qmp.sock")))
        await client.execute("qmp_capabilities")
        return client

    async def set_up(self, client: Client) -> None:
        disk = {"driver": "file", "node_name": "disk", "filename": str(self.disk)}
        await client.execute("blockdev-add", **disk)
        await client.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        address = {"type": "unix", "data": {"path": str(self.directory / "nbd.sock")}}
        await client.execute("nbd-server-start", addr=address)
        await self.export(client)

    async def export(self, client: Client) -> None:
        export = {"id": "disk", "type": "nbd", "node_name": "disk", "writable": True}
        await client.execute("block-export-add", **export)

    async def write(self, offset: int) -> bool:
        """A guest writes there; whether it is answered before its connection ends."""

        def write() -> bool:
            with NbdClient.open(str(self.directory / "nbd.sock"), "disk") as guest:
                try:
                    guest.write(offset, DATA)
                except (EOFError, ConnectionError):
                    return False
                return True

        return await trio.to_thread.run_sync(write)


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    """The daemon takes what it finds for its own, for good."""
    yield
    gc.unfreeze()


@asynccontextmanager
async def running_daemon(
    directory: Path, patch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Running, Client]]:
    """With a guest that has written to the disk's first region. It ends with the body."""
    running = Running(directory)
    running.patch(patch)
    running.disk.write_bytes(bytes(DISK_BYTES))
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            await running.ready.wait()
            client = await running.client()
            await running.set_up(client)
            assert await running.write(0)
            try:
                yield running, client
            finally:
                running.go.set()
            await running.ended.wait()
            client.close()


@asynccontextmanager
async def hung_write(running: Running, *, answered: bool) -> AsyncIterator[None]:
    """In the body a guest waits for a region to be armed; with the body the wait ends."""

    async def write() -> None:
        assert await running.write(DISK_BYTES // 2) == answered

    running.go.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.to_thread.run_sync(running.hung.wait)
        yield


async def by_quit(client: Client) -> None:
    await client.send("quit")


async def by_signal(_: Client) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("end", [by_quit, by_signal])
async def test_the_disk_is_flushed_and_clients_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[Client], Awaitable[None]]
) -> None:
    """Before the last resort, which ends the process without the state directory."""
    async with running_daemon(tmp_path, monkeypatch) as (running, client):
        running.flushed.clear()
        async with hung_write(running, answered=False):
            await end(client)
        await trio.to_thread.run_sync(running.flushed.wait)
        content = running.disk.read_bytes()
        assert content.startswith(DATA)
        assert content[4096:] == bytes(DISK_BYTES - 4096)


async def test_an_export_is_deleted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_daemon(tmp_path, monkeypatch) as (running, client):
        async with hung_write(running, answered=False):
            await client.execute("block-export-del", id="disk", mode="hard")
        await running.export(client)
        # The region is armed already.
        assert await running.write(MIB)
        running.go.set()
        assert await running.write(DISK_BYTES // 2)
        await client.send("quit")


async def test_a_guest_is_answered_once_the_directory_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_daemon(tmp_path, monkeypatch) as (running, client):
        async with hung_write(running, answered=True):
            running.go.set()
        await client.send("quit")
