"""One QMP client and its monitor, over a pair of sockets."""

from __future__ import annotations

import itertools
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, cast

import pytest
import trio

from blockd import limits
from blockd.events import Bus
from blockd.qmp import access
from blockd.qmp.access import Credentials, Role
from blockd.qmp.dispatch import Command, Dispatcher
from blockd.qmp.monitor import Monitor
from blockd.qmp.services import Services
from blockd.qmp.types import base
from tests.helpers.patience import PATIENCE_SECONDS

ME = Credentials(pid=4242, uid=1000, groups=frozenset())
CAPABILITIES = b'{"execute": "qmp_capabilities"}'


class Nothing(base.Command, kw_only=True):
    """No arguments."""

    command: ClassVar[str] = ""


class Look(base.Query, kw_only=True):
    """No arguments, and nothing changes."""

    command: ClassVar[str] = ""


class Number(base.Command, kw_only=True):
    """One argument."""

    command: ClassVar[str] = ""

    number: base.Int64


class Client:
    """The other end: sends bytes, reads messages."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._received = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def next(self) -> dict[str, Any]:
        """The next message. Raises ``EOFError``."""
        while b"\n" not in self._received:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        assert line.endswith(b"\r")
        message: dict[str, Any] = json.loads(line)
        return message

    async def rest(self) -> list[dict[str, Any]]:
        """All messages up to the end of the connection."""
        messages = []
        try:
            while True:
                messages.append(await self.next())
        except EOFError:
            return messages

    async def ask(self, data: bytes) -> dict[str, Any]:
        await self.send(data)
        return await self.next()

    async def negotiate(self) -> None:
        assert "QMP" in await self.next()
        assert await self.ask(CAPABILITIES) == {"return": {}}


class Stage:
    """Monitors that share one bus and one set of commands."""

    def __init__(self, nursery: trio.Nursery, clients: list[Client]) -> None:
        self.bus = Bus()
        self.commands: list[Command] = []
        self.services = cast("Services", self)
        #: What Services has for the dispatcher.
        self.changes = trio.Lock()
        self.ending = False
        self._nursery = nursery
        self.clients = clients
        self._numbers = itertools.count(1)
        #: That of the clients to come.
        self.role = Role.FULL
        self.ended = 0

    def command(self, name: str, handler: Callable[..., Any], **options: bool) -> None:
        declaration = Number if "number" in name else Look if "query" in name else Nothing
        self.commands.append(Command(name, declaration, handler, **options))

    async def connect(self) -> Client:
        ours, theirs = trio.socket.socketpair()
        self._nursery.start_soon(self._serve, trio.SocketStream(ours))
        self.clients.append(Client(trio.SocketStream(theirs)))
        return self.clients[-1]

    async def negotiated(self) -> Client:
        client = await self.connect()
        await client.negotiate()
        return client

    async def _serve(self, stream: trio.SocketStream) -> None:
        client = access.Client(next(self._numbers), ME, self.role)
        monitor = Monitor(stream, Dispatcher(self.commands, self.services), self.bus, client)
        async with stream:
            try:
                await monitor.serve()
            except* trio.BrokenResourceError:
                pass
        self.ended += 1


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    """A test that hangs fails, with what it waited for."""
    clients: list[Client] = []
    try:
        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                yield Stage(nursery, clients)
                nursery.cancel_scope.cancel()
    finally:
        for client in clients:
            client.stream.socket.close()


def error(error_class: str, description: str) -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": description}}


# -- the session ---------------------------------------------------------------------------------


async def test_a_session() -> None:
    async with open_stage() as stage:
        stage.command("x-hello", lambda _services, _arguments: ["hello"])
        client = await stage.connect()
        assert (await client.next())["QMP"]["capabilities"] == []
        refused = error(
            "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"
        )
        assert await client.ask(b'{"execute": "x-hello"}') == refused
        assert await client.ask(CAPABILITIES) == {"return": {}}
        assert await client.ask(b'{"execute": "x-hello"}') == {"return": ["hello"]}
        again = error(
            "CommandNotFound", "Capabilities negotiation is already complete, command ignored"
        )
        assert await client.ask(CAPABILITIES) == again


async def test_a_capability_that_is_not_offered() -> None:
    async with open_stage() as stage:
        client = await stage.connect()
        await client.next()
        wanted = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
        assert await client.ask(wanted) == error("GenericError", "Capability oob not available")
        assert await client.ask(CAPABILITIES) == {"return": {}}


async def test_each_client_negotiates_for_itself() -> None:
    async with open_stage() as stage:
        first = await stage.negotiated()
        second = await stage.connect()
        await second.next()
        assert "error" in await second.ask(b'{"execute": "x"}')
        unknown = error("CommandNotFound", "The command x has not been found")
        assert await first.ask(b'{"execute": "x"}') == unknown


@pytest.mark.parametrize("request_id", ["1", "null", '"é"', "[1, {}]", '{"a": [true]}', "1.5"])
async def test_the_id_comes_back_with_replies_and_errors(request_id: str) -> None:
    async with open_stage() as stage:
        stage.command("x-nothing", lambda _services, _arguments: None)
        client = await stage.negotiated()
        for request in (
            '{"execute": "x-nothing", "id": %s}',
            '{"id": %s, "execute": "x-unknown"}',
            '{"id": %s}',
            '{"id": %s, "execute": 5}',
        ):
            reply = await client.ask((request % request_id).encode())
            assert reply["id"] == json.loads(request_id)


async def test_commands_are_answered_in_order_however_they_are_cut() -> None:
    async with open_stage() as stage:

        async def number(_services: Services, arguments: Number) -> int:
            await trio.lowlevel.checkpoint()
            return arguments.number

        stage.command("x-number", number)
        stage.command("x-number-now", lambda _services, arguments: arguments.number)
        client = await stage.negotiated()
        text = "".join(
            json.dumps({"execute": name, "arguments": {"number": number}})
            for number, name in enumerate(["x-number", "x-number-now"] * 10)
        ).encode()
        for size in (1, 7, len(text)):
            for at in range(0, len(text), size):
                await client.send(text[at : at + size])
            assert [await client.next() for _ in range(20)] == [
                {"return": number} for number in range(20)
            ]


# -- clients that may only look ------------------------------------------------------------------


async def test_a_client_that_may_only_look() -> None:
    async with open_stage() as stage:
        changes: list[str] = []
        stage.command("x-change", lambda _services, _arguments: changes.append("made"))
        stage.command("x-query", lambda _services, _arguments: changes)
        master = await stage.negotiated()
        stage.role = Role.READ_ONLY
        guest = await stage.negotiated()
        refused = error(
            "GenericError", "The command x-change is not for clients that may only look"
        )
        assert await guest.ask(b'{"execute": "x-change"}') == refused
        # Who asked comes before what was asked for.
        assert await guest.ask(b'{"execute": "x-change", "arguments": {"x": 1}}') == refused
        unknown = error("CommandNotFound", "The command x has not been found")
        assert await guest.ask(b'{"execute": "x"}') == unknown
        assert await guest.ask(b'{"execute": "x-query"}') == {"return": []}
        assert await master.ask(b'{"execute": "x-change"}') == {"return": {}}
        assert await guest.ask(b'{"execute": "x-query"}') == {"return": ["made"]}
        stage.bus.publish("TICK", {})
        assert (await guest.next())["event"] == "TICK"


async def test_what_changes_something_or_would_is_audited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with open_stage() as stage:
        leave = trio.Event()
        stage.command("x-number", lambda _services, _arguments: None)
        stage.command("x-query", lambda _services, _arguments: None)
        stage.command("x-bug", lambda _services, _arguments: dict[str, str]()["bug"])
        stage.command("x-wait", lambda _services, _arguments: leave.wait(), concurrent=True)
        client = await stage.negotiated()
        for text in ("x-number", 'x-number", "arguments": {"number": 5}, "id": "1', "x-query", "x"):
            await client.ask(b'{"execute": "%s"}' % text.encode())
        await client.ask(b'{"execute": "x-bug"}')
        stage.role = Role.READ_ONLY
        guest = await stage.negotiated()
        await guest.ask(b'{"execute": "x-number"}')
        await client.send(b'{"execute": "x-wait"}')
        await trio.testing.wait_all_tasks_blocked()
    told = [
        record.getMessage().removeprefix("audit: uid=1000 pid=4242 client=")
        for record in caplog.records
        if record.name == "blockd.qmp.audit"
    ]
    refused = "The command x-number is not for clients that may only look"
    bug = "Internal error: KeyError('bug'); see the daemon's log"
    assert told == [
        "1 command=x-number arguments={} result=GenericError \"Parameter 'number' is missing\"",
        '1 command=x-number arguments={"number":5} result=ok',
        f'1 command=x-bug arguments={{}} result=GenericError "{bug}"',
        f'2 command=x-number arguments={{}} result=GenericError "{refused}"',
        "1 command=x-wait arguments={} result=interrupted",
    ]


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [b"}", b"[]", b'"x"', b"nonsense\n", b'{"execute": "x-ok}\n', b'{"a":}', b"\x00", b"\xff\xff"],
)
async def test_after_a_mistake_the_connection_goes_on(garbage: bytes) -> None:
    async with open_stage() as stage:
        stage.command("x-ok", lambda _services, _arguments: None)
        client = await stage.negotiated()
        await client.send(garbage + b'{"execute": "x-ok"}')
        reply = await client.next()
        while "error" in reply:
            assert reply["error"]["class"] == "GenericError"
            reply = await client.next()
        assert reply == {"return": {}}


async def test_a_message_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QMP_MESSAGE_BYTES", 1000)
    async with open_stage() as stage:
        client = await stage.negotiated()
        await client.send(b'{"execute": "' + b"x" * 100_000 + b'"}' + CAPABILITIES)
        assert await client.next() == error("GenericError", "JSON token size limit exceeded")
        assert (await client.next())["error"]["class"] == "CommandNotFound"


async def test_a_handler_with_a_bug_costs_one_error(caplog: pytest.LogCaptureFixture) -> None:
    async with open_stage() as stage:

        async def bug(_services: Services, _arguments: Nothing) -> None:
            raise KeyError("bug")

        stage.command("x-bug", bug)
        stage.command("x-unsendable", lambda _services, _arguments: object())
        client = await stage.negotiated()
        for name in (b"x-bug", b"x-unsendable"):
            reply = await client.ask(b'{"execute": "%s", "id": 1}' % name)
            assert reply["error"]["class"] == "GenericError"
            assert reply["id"] == 1
            assert caplog.records[-1].levelno == logging.ERROR
        assert "error" in await client.ask(b'{"execute": "x-other"}')


# -- events --------------------------------------------------------------------------------------


async def test_events_come_to_those_who_have_negotiated() -> None:
    async with open_stage() as stage:
        early = await stage.negotiated()
        late = await stage.connect()
        await late.next()
        stage.bus.publish("FIRST", {"n": 1})
        assert await late.ask(CAPABILITIES) == {"return": {}}
        stage.bus.publish("SECOND", {})
        assert [(await early.next())["event"] for _ in range(2)] == ["FIRST", "SECOND"]
        event = await late.next()
        assert event.keys() == {"timestamp", "event"}
        assert event["event"] == "SECOND"
        assert event["timestamp"].keys() == {"seconds", "microseconds"}


async def test_an_event_comes_before_or_after_a_reply_as_it_happened() -> None:
    async with open_stage() as stage:

        def start(_services: Services, _arguments: Nothing) -> None:
            stage.bus.publish("BEFORE", {})

        async def wait(_services: Services, _arguments: Nothing) -> None:
            await trio.lowlevel.checkpoint()
            stage.bus.publish("BEFORE", {})

        stage.command("x-start", start)
        stage.command("x-wait", wait)
        client = await stage.negotiated()
        for name in ("x-start", "x-wait"):
            first = await client.ask(b'{"execute": "%s"}' % name.encode())
            stage.bus.publish("AFTER", {})
            assert first["event"] == "BEFORE"
            assert await client.next() == {"return": {}}
            assert (await client.next())["event"] == "AFTER"


async def test_a_client_that_has_gone_is_told_nothing_more() -> None:
    async with open_stage() as stage:
        client = await stage.negotiated()
        await client.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.ended == 1
        stage.bus.publish("LATE", {})


# -- slow clients --------------------------------------------------------------------------------


async def test_a_client_that_never_reads_is_dropped_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "QMP_OUTBOX_BYTES", 100_000)
    async with open_stage() as stage:
        lazy = await stage.negotiated()
        lively = await stage.negotiated()
        sent = 0
        while stage.ended == 0:
            for _ in range(10):
                stage.bus.publish("TICK", {"number": sent, "text": "x" * 500})
                sent += 1
            for number in range(sent - 10, sent):
                assert (await lively.next())["data"]["number"] == number
            # A socket holds some; the rest is for the queue.
            assert sent < 10_000
        (record,) = caplog.records
        assert record.getMessage() == (
            "QMP client 1 (uid 1000, pid 4242) was dropped: it left more than 100000 bytes unread"
        )
        assert len(await lazy.rest()) < sent
        assert "error" in await lively.ask(b'{"execute": "x"}')


async def test_the_commands_of_a_client_that_reads_no_replies_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QMP_OUTBOX_BYTES", 100_000)
    async with open_stage() as stage:
        carried_out = 0

        def number(_services: Services, arguments: Number) -> list[object]:
            nonlocal carried_out
            carried_out += 1
            return [arguments.number, "x" * 1000]

        stage.command("x-number", number)
        client = await stage.negotiated()

        async def send_all() -> None:
            for each in range(2000):
                await client.send(b'{"execute": "x-number", "arguments": {"number": %d}}' % each)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await trio.testing.wait_all_tasks_blocked()
            assert 0 < carried_out < 2000
            for each in range(2000):
                assert (await client.next())["return"][0] == each
        assert carried_out == 2000


async def test_a_large_reply_arrives_whole() -> None:
    async with open_stage() as stage:
        large = ["x" * 1000] * 3000
        stage.command("x-large", lambda _services, _arguments: large)
        client = await stage.negotiated()
        for _ in range(3):
            assert await client.ask(b'{"execute": "x-large"}') == {"return": large}


# -- clients that go -----------------------------------------------------------------------------


async def test_one_that_sends_no_more_still_gets_its_replies() -> None:
    """As ``printf … | socat - UNIX:…`` does it."""
    async with open_stage() as stage:
        large = ["x" * 1000] * 1000
        stage.command("x-large", lambda _services, _arguments: large)
        client = await stage.negotiated()
        await client.send(b'{"execute": "x-large"}' * 3)
        client.stream.socket.shutdown(socket.SHUT_WR)
        assert await client.rest() == [{"return": large}] * 3
        await trio.testing.wait_all_tasks_blocked()
        assert stage.ended == 1


class LongChange:
    """A command that goes on until it may leave."""

    def __init__(self) -> None:
        self.leave = trio.Event()
        self.log: list[str] = []

    async def run(self, _services: Services, _arguments: Nothing) -> None:
        self.log.append("begun")
        await self.leave.wait()
        self.log.append("done")


async def test_what_a_client_has_begun_is_carried_out_without_it() -> None:
    async with open_stage() as stage:
        change = LongChange()
        stage.command("x-change", change.run)
        client = await stage.negotiated()
        await client.send(b'{"execute": "x-change"}')
        await trio.testing.wait_all_tasks_blocked()
        await client.stream.aclose()
        for _ in range(2):
            # The first is lost on the way, the second finds nobody.
            stage.bus.publish("TICK", {})
            await trio.testing.wait_all_tasks_blocked()
        change.leave.set()
        await trio.testing.wait_all_tasks_blocked()
        assert change.log == ["begun", "done"]
        assert stage.ended == 1


async def test_what_a_dropped_client_has_begun_is_carried_out_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QMP_OUTBOX_BYTES", 10_000)
    async with open_stage() as stage:
        change = LongChange()
        stage.command("x-change", change.run)
        client = await stage.negotiated()
        await client.send(b'{"execute": "x-change"}')
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(1000):
            stage.bus.publish("TICK", {"text": "x" * 1000})
        await trio.testing.wait_all_tasks_blocked()
        change.leave.set()
        await trio.testing.wait_all_tasks_blocked()
        assert change.log == ["begun", "done"]
        assert stage.ended == 1
