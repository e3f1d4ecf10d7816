"""TLS on the server's side: what may go wrong with it, and that it carries all that NBD does."""

from __future__ import annotations

import logging
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from blockd import limits
from blockd.nbd import Certificate, Settings, Tls
from blockd.nbd.activity import Activity
from blockd.nbd.channel import Channel
from blockd.nbd.tls import TlsSocket
from blockd.nbd.wire import Cmd, Option
from blockd.objects import Endpoint
from blockd.objects.tls import TlsX509
from tests.helpers.certificates import Authority
from tests.helpers.nbd_codec import Call, info_bytes, option_bytes
from tests.helpers.nbd_server import DISK_BYTES, RawClient, Rig, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with certificates for both ends."""
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory / "authority")
    authority.issue(directory / "both", "server")
    return authority.issue(directory / "both", "client")


def context(credentials: Path, end: Endpoint) -> ssl.SSLContext:
    return TlsX509.load(end, str(credentials), None, verify_peer=True).context


@pytest.fixture
def ours(credentials: Path) -> ssl.SSLContext:
    return context(credentials, Endpoint.SERVER)


@pytest.fixture
def theirs(credentials: Path) -> ssl.SSLContext:
    return context(credentials, Endpoint.CLIENT)


async def admit_all(_: Certificate) -> None: ...


@pytest.fixture
def driver() -> WatchedDriver:
    """A disk of which each other request does not finish at once."""
    driver = WatchedDriver(DISK_BYTES)
    turns = random.Random(1)
    driver.nowait = lambda _: turns.random() < 0.5
    return driver


@pytest.fixture
async def rig(tmp_path: Path, driver: WatchedDriver, ours: ssl.SSLContext) -> AsyncIterator[Rig]:
    async with serving(tmp_path, Settings(tls=Tls(lambda: ours, admit_all))) as rig:
        rig.export(rig.node("disk", driver))
        yield rig


async def connect(rig: Rig, theirs: ssl.SSLContext) -> RawClient:
    client = await rig.connect()
    await client.greet()
    await client.start_tls(theirs)
    return client


# --- the handshake ----------------------------------------------------------------------------


async def test_what_is_injected_before_the_encryption_ends_the_connection(rig: Rig) -> None:
    client = await rig.connect()
    await client.greet()
    injected = option_bytes(Option.GO, info_bytes(b"disk"))
    await client.send(option_bytes(Option.STARTTLS) + injected)
    await client.receive(20)
    # At the most an alert, which says that this was no TLS.
    assert len(await client.receive(1000)) < 20
    await rig.wait_until_alone()


@pytest.mark.parametrize("options", [b"", option_bytes(Option.STARTTLS)])
async def test_a_half_open_connection_is_dropped_in_time(
    tmp_path: Path, ours: ssl.SSLContext, options: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(
        tmp_path, Settings(handshake_seconds=7, tls=Tls(lambda: ours, admit_all))
    ) as rig:
        client = await rig.connect()
        await client.greet()
        await client.send(options)
        await rig.wait_until_alone()
        assert trio.current_time() == pytest.approx(7, abs=0.1)


async def test_a_client_that_fails_at_tls_is_no_alarm(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = await rig.connect()
    await client.greet()
    # It is the client that does not trust the server.
    with pytest.raises(trio.BrokenResourceError):
        await client.start_tls(nobody)
    await client.close()
    await rig.wait_until_alone()
    (told,) = (record for record in caplog.records if record.name == "blockd.nbd.server")
    assert told.levelno == logging.INFO
    assert "during the TLS handshake" in told.getMessage()


# --- transmission -----------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
async def test_requests_of_every_size_get_through(
    rig: Rig, driver: WatchedDriver, theirs: ssl.SSLContext, *, structured: bool
) -> None:
    client = await connect(rig, theirs)
    await client.choose("disk", structured=structured)
    places = random.Random(2)
    sizes = [1, 512, 4 * KIB, 16 * KIB, 100 * KIB, 300 * KIB, 1000 * KIB]
    writes, reads = [], []
    model = bytearray(DISK_BYTES)
    for number in range(60):
        length = sizes[number % len(sizes)]
        offset = places.randrange(DISK_BYTES - length)
        data = os.urandom(length)
        model[offset : offset + length] = data
        writes.append(Call(Cmd.WRITE, offset, data=data))
        reads.append(Call(Cmd.READ, offset, length))
    for write in writes:
        assert await client.pipeline([write]) == [b""]
    assert driver.data == model
    answers = await client.pipeline(reads)
    assert answers == [bytes(model[call.offset : call.offset + call.length]) for call in reads]


async def test_a_client_may_leave_in_order(rig: Rig, theirs: ssl.SSLContext) -> None:
    """TLS's good-bye is heard, and answered, though the socket stays open."""
    client = await connect(rig, theirs)
    await client.choose("disk")
    assert isinstance(client.stream, trio.SSLStream)
    below, _ = await client.stream.unwrap()
    assert await below.receive_some(1) == b""
    await rig.wait_until_alone()
    await below.aclose()


async def test_replies_to_a_client_that_reads_late_stay_whole(
    credentials: Path, theirs: ssl.SSLContext
) -> None:
    """Where a socket takes no more, what is encrypted already is sent once, and first."""
    channel, client = await channel_and_client(context(credentials, Endpoint.SERVER), theirs)
    bursts = [bytes([number]) * size for number, size in enumerate([10, 300 * KIB, 5, 4 << 20, 7])]
    async with trio.open_nursery() as nursery:
        for burst in bursts:
            nursery.start_soon(channel.send_burst, memoryview(burst))
        await trio.testing.wait_all_tasks_blocked()
        received = bytearray()
        while len(received) < sum(map(len, bursts)):
            received += await client.receive_some()
    order = sorted(bursts, key=received.index)
    assert bytes(received) == b"".join(order)
    channel.close()
    await client.aclose()


async def channel_and_client(
    ours: ssl.SSLContext, theirs: ssl.SSLContext
) -> tuple[Channel, trio.SSLStream[trio.SocketStream]]:
    """Both ends of a connection that is encrypted from the start."""
    server_end, client_end = socket.socketpair()
    server_end.setblocking(False)
    client_end.setblocking(False)
    channel = Channel(server_end, Activity())
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client_end))
    client = trio.SSLStream(stream, theirs, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        certificate = await channel.start_tls(ours, b"")
    assert certificate["subject"] == (
        (("organizationName", "Test"),),
        (("commonName", "localhost"),),
    )
    return channel, client


async def test_a_burst_of_requests_is_received_at_once(
    ours: ssl.SSLContext, theirs: ssl.SSLContext
) -> None:
    channel, client = await channel_and_client(ours, theirs)
    for number in range(100):
        await client.send_all(bytes([number]) * 28)
    view = memoryview(bytearray(limits.NBD_RECEIVE_BUFFER_BYTES))
    assert await channel.receive_into(view) == 2800
    await client.aclose()
    assert await channel.receive_into(view) == 0
    channel.close()


class Drip(socket.socket):
    """Gives no more than a byte at a time, once ``drips``."""

    drips = False

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return super().recv_into(buffer[:1] if self.drips else buffer, nbytes, flags)


async def test_a_record_that_never_ends_keeps_nobody_waiting(
    ours: ssl.SSLContext, theirs: ssl.SSLContext
) -> None:
    """It is up to the caller to come back for more of it, however fast that comes."""
    here, there = socket.socketpair()
    drip = Drip(fileno=here.detach())
    drip.setblocking(False)
    there.setblocking(False)
    async with trio.open_nursery() as nursery:
        start = TlsSocket.start
        nursery.start_soon(partial(start, there, theirs, server=False, hostname="localhost"))
        secure = await start(drip, ours, server=True)
    drip.drips = True
    there.send(b"\x17\x03\x03\x40\x00" + bytes(16384))
    with pytest.raises(BlockingIOError):
        secure.recv_into(memoryview(bytearray(100)))
    assert len(drip.recv(100_000, socket.MSG_PEEK)) > 16_000
    secure.close()
    there.close()


class Wishes:
    """TLS of which each piece that comes in wants an answer, and is no data."""

    def __init__(self, incoming: ssl.MemoryBIO, out: ssl.MemoryBIO) -> None:
        self._incoming, self._out = incoming, out

    def pending(self) -> int:
        return 0

    def read(self, _count: int, _view: memoryview) -> int:
        self._out.write(self._incoming.read())
        raise ssl.SSLWantReadError

    def write(self, view: memoryview) -> int:
        self._out.write(bytes(view) + b"some more")
        return len(view)

    def unwrap(self) -> None: ...


def test_wishes_for_new_keys_are_answered_and_fill_no_memory() -> None:
    incoming, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    here, there = socket.socketpair()
    here.setblocking(False)
    wishes = cast(ssl.SSLObject, Wishes(incoming, out))
    secure = TlsSocket(here, wishes, incoming, out)
    view = memoryview(bytearray(100))
    there.send(b"wish")
    with pytest.raises(BlockingIOError):
        secure.recv_into(view)
    assert there.recv(100) == b"wish"

    def wish_for_ever() -> None:
        while True:
            there.send(bytes(limits.NBD_TLS_RECEIVE_BYTES))
            with suppress(BlockingIOError):
                secure.recv_into(view)

    with pytest.raises(ConnectionAbortedError):
        wish_for_ever()
    assert out.pending <= 2 * limits.NBD_TLS_SEND_BYTES + limits.NBD_TLS_RECEIVE_BYTES
    secure.close()
    there.close()


def test_a_reply_behind_an_answer_that_waits_is_no_wish() -> None:
    incoming, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    here, there = socket.socketpair()
    here.setblocking(False)
    secure = TlsSocket(here, cast(ssl.SSLObject, Wishes(incoming, out)), incoming, out)
    full = 0
    with suppress(BlockingIOError):
        while True:
            full += here.send(bytes(4 * KIB))
    view, reply = memoryview(bytearray(100)), memoryview(b"r" * limits.NBD_TLS_SEND_BYTES)
    there.send(b"wish")
    with pytest.raises(BlockingIOError):
        secure.recv_into(view)
    with pytest.raises(BlockingIOError):
        secure.send(reply)
    there.send(b"wish")
    with pytest.raises(BlockingIOError):
        secure.recv_into(view)
    there.recv(full, socket.MSG_WAITALL)
    with suppress(BlockingIOError):
        secure.send(reply)
    assert there.recv(len(reply), socket.MSG_WAITALL).startswith(b"wishrrrr")
    secure.close()
    there.close()
