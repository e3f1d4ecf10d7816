"""An NBD server inside the test's own process, and clients of two kinds for it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from blockd.bitmap import DirtyBitmap
from blockd.block import Graph, Node
from blockd.events import Bus, Event
from blockd.listener import UnixAddress
from blockd.nbd import Export, NbdServer, Settings, wire
from blockd.nbd.chunks import parse_chunk
from blockd.nbd.wire import Cmd, Errno, Option
from tests.helpers.memory_driver import Hold
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import (
    Call,
    NbdError,
    Pending,
    info_bytes,
    option_bytes,
    request_bytes,
)
from tests.helpers.watched_driver import WatchedDriver

_Result = TypeVar("_Result")

DISK_BYTES = 1024 * 1024


class Rig:
    """A server with its nodes and exports; ``events`` are all that were published."""

    def __init__(self, nursery: trio.Nursery, path: Path) -> None:
        self.path = str(path)
        self.events: list[Event] = []
        bus = Bus()
        bus.subscribe(self.events.append)
        self.graph = Graph()
        self.server = NbdServer(nursery, bus)
        self._clients: list[NbdClient | RawClient] = []

    async def start(self, settings: Settings | None = None) -> None:
        await self.server.start(UnixAddress(self.path), settings or Settings())

    def node(self, name: str, driver: WatchedDriver | None = None) -> Node:
        """A node over ``driver``, or over a disk of zeroes that is read and written inline."""
        if driver is None:
            driver = WatchedDriver(DISK_BYTES)
            driver.nowait = lambda _: True
        return self.graph.add(name, driver, owned=True)

    def export(
        self,
        node: Node,
        name: str | None = None,
        *,
        writable: bool = True,
        writethrough: bool = False,
        description: str = "",
        bitmaps: Sequence[DirtyBitmap] = (),
        allocation_depth: bool = False,
    ) -> Export:
        name = node.name if name is None else name
        self.server.check_id(f"id-{name}")
        self.server.check_name(name)
        export = Export(
            f"id-{name}",
            node,
            name=name,
            description=description,
            writable=writable,
            writethrough=writethrough,
            graph=self.graph,
            bitmaps=bitmaps,
            allocation_depth=allocation_depth,
        )
        self.server.add(export)
        return export

    def deleted(self) -> list[str]:
        """The exports that were said to be gone."""
        return [e.data["id"] for e in self.events if e.name == "BLOCK_EXPORT_DELETED"]

    async def client(
        self,
        name: str = "disk",
        *contexts: str,
        structured: bool = True,
        extended: bool = False,
    ) -> NbdClient:
        """A client of the blocking kind, for ``in_thread``."""
        client = await in_thread(
            lambda: NbdClient.open(
                self.path, name, *contexts, structured=structured, extended=extended
            )
        )
        self._clients.append(client)
        return client

    async def connect(self) -> RawClient:
        """A client with the handshake before it."""
        client = RawClient(await trio.open_unix_socket(self.path))
        self._clients.append(client)
        return client

    async def raw(self, name: str = "disk", *, structured: bool = False) -> RawClient:
        """A client that has come through the handshake."""
        client = await self.connect()
        await client.go(name, structured=structured)
        return client

    async def wait_until_alone(self) -> None:
        """Return once the server has no client."""
        assert self.server._running is not None
        while self.server._running.connections:
            await self.server._connection_ended.wait()

    async def close(self) -> None:
        await self.server.close()
        for client in self._clients:
            if isinstance(client, RawClient):
                await client.close()
            else:
                client.close()


async def in_thread(call: Callable[[], _Result]) -> _Result:
    """Run what blocks, such as a client's calls; it ends when the client's connection does."""
    return await trio.to_thread.run_sync(call)


class RawClient:
    """A connection whose bytes the test sends and receives itself."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = stream
        self._cookie = 0

    async def go(self, name: str, *, structured: bool = False) -> None:
        await self.greet()
        await self.choose(name, structured=structured)

    async def greet(self) -> None:
        await self.receive(18)
        await self.send((3).to_bytes(4))

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """The certificate of the server has to be for localhost."""
        assert isinstance(self.stream, trio.SocketStream)
        await self.send(option_bytes(Option.STARTTLS))
        await self._await_ack()
        secure = trio.SSLStream(self.stream, context, server_hostname="localhost")
        await secure.do_handshake()
        self.stream = secure

    async def choose(self, name: str, *, structured: bool = False) -> None:
        """Enter transmission."""
        options = option_bytes(Option.STRUCTURED_REPLY) if structured else b""
        await self.send(options + option_bytes(Option.GO, info_bytes(name.encode())))
        for _ in range(2 if structured else 1):
            await self._await_ack()

    async def _await_ack(self) -> None:
        kind = 0
        while kind != 1:
            header = await self.receive(20)
            kind = int.from_bytes(header[12:16])
            assert kind < 2**31, await self.receive(int.from_bytes(header[16:]))
            await self.receive(int.from_bytes(header[16:]))

    async def close(self) -> None:
        await self.stream.aclose()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive(self, count: int) -> bytes:
        """Exactly ``count`` bytes, or up to the connection's end."""
        data = bytearray()
        with suppress(trio.BrokenResourceError):
            while len(data) < count:
                piece = await self.stream.receive_some(count - len(data))
                if not piece:
                    break
                data += piece
        return bytes(data)

    async def at_end(self) -> bool:
        """Whether the server closes the connection rather than send something."""
        return not await self.receive(1)

    async def send_until_cut_off(self, data: bytes) -> None:
        """Send, and throw away what comes, until the server has closed the connection."""

        async def send() -> None:
            with suppress(trio.BrokenResourceError):
                await self.send(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while not await self.at_end():
                pass

    async def request(self, call: Call) -> int:
        """Send a request; its cookie."""
        self._cookie += 1
        await self.send(request_bytes(call, self._cookie))
        return self._cookie

    async def reply(self) -> tuple[int, int]:
        """Cookie and error of a simple reply; a READ's data come next."""
        header = await self.receive(16)
        assert header[:4] == bytes.fromhex("67446698"), header
        return int.from_bytes(header[8:]), int.from_bytes(header[4:8])

    async def read(self, offset: int, length: int) -> bytes:
        """Read, with nothing else in flight."""
        cookie = await self.request(Call(Cmd.READ, offset, length))
        assert await self.reply() == (cookie, 0)
        return await self.receive(length)

    async def pipeline(self, calls: Sequence[Call]) -> list[bytes | NbdError]:
        """Run requests, all in flight at once, and nothing else; their results in order.

        Sends and receives at the same time, so that neither end has to hold it all.
        """
        pending = {
            number: Pending(call, bytearray(call.length if call.cmd == Cmd.READ else 0))
            for number, call in enumerate(calls)
        }
        results: dict[int, bytes | NbdError] = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all, calls)
            while len(results) < len(calls):
                await self._take_reply(pending, results)
        return [results[number] for number in range(len(calls))]

    async def _send_all(self, calls: Sequence[Call]) -> None:
        for number, call in enumerate(calls):
            await self.send(request_bytes(call, number))

    async def _take_reply(
        self, pending: dict[int, Pending], results: dict[int, bytes | NbdError]
    ) -> None:
        head = await self.receive(wire.SIMPLE_REPLY.size)
        magic, errno, cookie = wire.SIMPLE_REPLY.unpack(head)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            data = b"" if errno else await self.receive(len(pending[cookie].data))
            results[cookie] = NbdError(Errno(errno), "") if errno else data
            return
        head += await self.receive(wire.STRUCTURED_HEADER.size - len(head))
        flags, kind, cookie, _, length = parse_chunk(head, extended=False)
        done = bool(flags & wire.DONE)
        pending[cookie].take_chunk(kind, await self.receive(length), done=done)
        if done:
            results[cookie] = pending[cookie].error or bytes(pending[cookie].data)

    async def write(self, offset: int, data: bytes) -> None:
        """Write, with nothing else in flight."""
        cookie = await self.request(Call(Cmd.WRITE, offset, data=data))
        assert await self.reply() == (cookie, 0)


@dataclass(frozen=True)
class SlowDisk:
    """What is behind the export ``slow``: it has a client's write, and does not give it back."""

    driver: WatchedDriver
    hold: Hold


async def slow_disk(rig: Rig) -> SlowDisk:
    """Such a one, with "data" to write at its start; it takes no notice of cancellation."""
    driver = WatchedDriver(DISK_BYTES)
    driver.stubborn = True
    hold = driver.hold("write")
    rig.export(rig.node("slow", driver))
    client = await rig.raw("slow")
    await client.request(Call(Cmd.WRITE, data=b"data"))
    await hold.reached.wait()
    return SlowDisk(driver, hold)


@asynccontextmanager
async def serving(directory: Path, settings: Settings | None = None) -> AsyncIterator[Rig]:
    """A rig whose server listens; it is closed at the end, whatever the test left."""
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery, directory / "nbd.sock")
        await rig.start(settings)
        try:
            yield rig
        finally:
            with trio.CancelScope(shield=True):
                await rig.close()
    assert rig.server.exports() == []
    assert not any(node.users for node in rig.graph)
