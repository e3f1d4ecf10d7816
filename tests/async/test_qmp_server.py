"""The QMP server on a real socket, with real clients."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import qemu.qmp
import trio

from blockd import limits
from blockd.block import Graph
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.job import Jobs
from blockd.nbd.server import NbdServer
from blockd.qmp.access import AccessList, Holders
from blockd.qmp.server import QmpServer
from blockd.qmp.services import Services
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient, QmpError


@dataclass
class Running:
    """A server, and what its commands work on."""

    server: QmpServer
    bus: Bus
    #: Set by ``quit``.
    stop: trio.Event


@asynccontextmanager
async def running(path: Path, access_list: AccessList | None = None) -> AsyncIterator[Running]:
    """Serve at ``path``; the body may close the server itself."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            bus = Bus()
            stop = trio.Event()

            async def end_service() -> None:
                bus.publish("THE_END", {})

            services = Services(
                Graph(), Jobs(nursery, bus), NbdServer(nursery, bus), bus, end_service, stop.set
            )
            server = QmpServer(str(path), services, access_list)
            await nursery.start(server.serve)
            yield Running(server, bus, stop)
            await server.close()


async def in_thread(function: Any, *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)


def ask_version(path: Path) -> str:
    with QmpClient(path) as client:
        version: str = client.execute("query-version")["package"]
        return version


def refusal(group: BaseExceptionGroup[Any]) -> str:
    """What the one who starts the server is told."""
    (error,) = group.exceptions
    if isinstance(error, BaseExceptionGroup):
        return refusal(error)
    assert isinstance(error, BlockdError)
    return error.message


# -- the socket ----------------------------------------------------------------------------------


async def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    before = os.umask(0)
    try:
        async with running(path):
            assert stat.filemode(path.stat().st_mode) == "srw-------"
    finally:
        os.umask(before)


async def test_the_socket_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path):
        assert path.is_socket()
    assert not path.exists()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with running(path):
        assert (await in_thread(ask_version, path)).startswith("blockd ")
    assert not path.exists()


async def test_a_live_socket_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path):
        with pytest.raises(ExceptionGroup) as refused:
            async with running(path):
                pass
        message = refusal(refused.value)
        assert str(path) in message
        assert "in use" in message
        assert (await in_thread(ask_version, path)).startswith("blockd ")


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "qmp.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExceptionGroup) as refused:
        async with running(path):
            pass
    assert str(path) in refusal(refused.value)
    assert path.is_symlink() or path.exists()
    assert kind != "file" or path.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/qmp.sock", "x" * 200])
async def test_where_no_socket_can_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExceptionGroup) as refused:
        async with running(tmp_path / name):
            pass
    assert str(tmp_path / name) in refusal(refused.value)


async def test_a_socket_that_has_taken_our_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


# -- clients -------------------------------------------------------------------------------------


async def test_ten_clients_at_once(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path) as stage:
        clients = [await in_thread(QmpClient, path) for _ in range(10)]
        stage.bus.publish("TICK", {"n": 1})
        for client in clients:
            names = await in_thread(client.execute, "query-commands")
            assert {"name": "quit"} in names
            assert (await in_thread(client.wait_event, "TICK"))["data"] == {"n": 1}
        for client in clients:
            client.close()


async def test_the_library_of_qemu(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"

    async def talk(number: int) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
        client = qemu.qmp.QMPClient(f"test {number}")
        with client.listener("TICK") as heard:
            await client.connect(str(path))
            version: Any = await client.execute("query-version")
            try:
                await client.execute("block-job-cancel", {"device": "none"})
                error = "no error"
            except qemu.qmp.ExecuteError as refused:
                error = refused.error_class
            trio.from_thread.run_sync(publish)
            event = await heard.get()
            await client.disconnect()
        return version["qemu"], error, [dict(event)]

    def publish() -> None:
        stage.bus.publish("TICK", {"n": 1})

    async def talk_all() -> list[Any]:
        return [await talk(number) for number in range(3)]

    async with running(path) as stage:
        for version, error, events in await in_thread(lambda: asyncio.run(talk_all())):
            assert version == {"major": 10, "minor": 0, "micro": 2}
            assert error == "DeviceNotActive"
            assert events[0]["data"] == {"n": 1}
            assert events[0]["timestamp"].keys() == {"seconds", "microseconds"}


async def test_a_client_that_leaves_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path):
        for data in (b"", b'{"execute": "qmp_capab', b'{"execute": "qmp_capabilities"}', b"\xff}"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(data)
        assert (await in_thread(ask_version, path)).startswith("blockd ")


# -- who may ----


MINE = Holders(uids=frozenset([os.geteuid()]))
MY_GROUPS = [Holders(gids=frozenset([gid])) for gid in {os.getegid(), *os.getgroups()}]
NOBODY = Holders()


def answers(path: Path) -> list[dict[str, Any]]:
    """All that a client gets who asks for two things and then waits for the end."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile() as lines:
        client.connect(str(path))
        got = [json.loads(lines.readline())]
        with suppress(ConnectionError):
            for command in ("qmp_capabilities", "query-jobs", "nbd-server-stop"):
                client.sendall(json.dumps({"execute": command}).encode())
                got.append(json.loads(lines.readline() or "null"))
        return got


@pytest.mark.parametrize("allowed", [MINE, *MY_GROUPS])
async def test_credentials_let_a_client_in(tmp_path: Path, allowed: Holders) -> None:
    path = tmp_path / "qmp.sock"
    stopped = {"error": {"class": "GenericError", "desc": "NBD server not running"}}
    refused = "The command nbd-server-stop is not for clients that may only look"
    for access_list, last in (
        (AccessList(allowed, NOBODY), stopped),
        (AccessList(allowed, allowed), stopped),
        (AccessList(NOBODY, allowed), {"error": {"class": "GenericError", "desc": refused}}),
    ):
        async with running(path, access_list):
            assert stat.filemode(path.stat().st_mode) == "srw-rw-rw-"
            greeting, *replies = await in_thread(answers, path)
            assert "QMP" in greeting
            assert replies == [{"return": {}}, {"return": []}, last]


async def test_who_is_not_on_the_list_is_told_so_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "qmp.sock"
    mine = {os.getegid(), *os.getgroups()}
    others = Holders(frozenset([os.geteuid() + 1]), frozenset([max(mine) + 1]))
    async with running(path, AccessList(others, others)):
        told = await in_thread(answers, path)
    desc = f"User {os.geteuid()} is not allowed to use this QMP socket"
    assert told[0] == {"error": {"class": "GenericError", "desc": desc}}
    assert told[1:] in ([], [None])
    assert [record.getMessage() for record in caplog.records] == [
        f"QMP: uid {os.geteuid()}, pid {os.getpid()} was refused"
    ]


async def test_who_is_refused_and_does_not_listen_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path, AccessList(NOBODY, NOBODY)):
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        assert len(await in_thread(answers, path)) >= 1


# -- the end -------------------------------------------------------------------------------------


async def test_quit_answers_when_the_service_has_ended_and_then_closes(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with running(path) as stage:
        client = await in_thread(QmpClient, path)
        other = await in_thread(QmpClient, path)
        assert await in_thread(client.execute, "quit") == {}
        assert [event["event"] for event in client.events] == ["THE_END"]
        await stage.stop.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.server.close)
            for each in (client, other):
                events = await in_thread(each.events_to_the_end)
                assert [event["event"] for event in events] == ["THE_END"]
                each.close()
    assert not path.exists()


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QMP_DRAIN_SECONDS", 0.1)
    path = tmp_path / "qmp.sock"
    async with running(path) as stage:
        lazy = await in_thread(QmpClient, path)
        for _ in range(2000):
            stage.bus.publish("TICK", {"text": "x" * 1000})
        await stage.server.close()
        with pytest.raises((EOFError, QmpError, BrokenPipeError)):
            await in_thread(lazy.execute, "query-version")
        lazy.close()
