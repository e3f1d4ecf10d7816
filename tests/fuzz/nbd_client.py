"""NBD's client: a server that says what it should, and then something else."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, suppress
from random import Random
from select import select

from blockd.nbd import wire
from blockd.nbd.chunks import Runs, chunk, hole, status
from blockd.nbd.wire import Cmd, Errno, Info, Option, Rep, ReplyType, Request
from tests.fuzz.nbd_server import damaged
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient, QmpError

SIZE = 1 << 20
FLAGS = 0xDED
REQUESTS_MAX = 50
#: A client that got less than it waits for waits for ever, as long as nobody hangs up.
HANG_UP_SECONDS = 0.02


class Hostile:
    """One connection's server: right at first, and from some message on no longer."""

    def __init__(self, sock: socket.socket, random: Random) -> None:
        self._sock = sock
        self._random = random
        self._good = random.choice([0, 3, 6, 8, 10, 15, 1000])
        self._extended = self._structured = False

    def serve(self) -> None:
        self._send(wire.GREETING.pack(wire.INIT_PASSWD, wire.OPTION_MAGIC, 3))
        self._receive(wire.CLIENT_FLAGS.size)
        while not self._answer_option():
            pass
        for _ in range(REQUESTS_MAX):
            if not self._answer_request():
                return

    def _send(self, data: bytes) -> None:
        self._good -= 1
        if self._good < 0 and self._random.random() < 0.5:
            data = damaged(self._random, data)
            self._sock.settimeout(HANG_UP_SECONDS)
        self._sock.sendall(data)

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _answer_option(self) -> bool:
        """Whether it was the last."""
        _, option, length = wire.OPTION_HEADER.unpack(self._receive(wire.OPTION_HEADER.size))
        self._receive(length)
        if option == Option.EXPORT_NAME:
            self._send(wire.EXPORT_NAME_REPLY.pack(SIZE, FLAGS))
            return True
        if option != Option.GO and self._random.random() < 0.2:
            self._send(wire.option_reply(option, Rep.ERR_UNSUP, b"no"))
            return False
        self._extended |= option == Option.EXTENDED_HEADERS
        self._structured |= option == Option.STRUCTURED_REPLY
        for kind, data in self._told(option):
            self._send(wire.option_reply(option, kind, data))
        self._send(wire.option_reply(option, Rep.ACK))
        return bool(option == Option.GO)

    def _told(self, option: int) -> list[tuple[Rep, bytes]]:
        if option == Option.SET_META_CONTEXT:
            return [(Rep.META_CONTEXT, wire.U32.pack(7) + b"base:allocation")]
        if option != Option.GO:
            return []
        sizes = self._random.choice([(1, 4096, 1 << 25), (512, 4096, 65536), (4096, 1, 4096)])
        return [
            (Rep.INFO, wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)),
            (Rep.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, SIZE, FLAGS)),
        ]

    def _answer_request(self) -> bool:
        """Whether another may follow."""
        form = wire.EXTENDED_REQUEST if self._extended else wire.REQUEST
        request = wire.parse_request(self._receive(form.size), extended=self._extended)
        assert request is not None
        if request.type == Cmd.DISC:
            return False
        if request.type == Cmd.WRITE:
            self._receive(request.length)
        replies = self._random.choice([1] * 20 + [0, 2])
        for _ in range(replies):
            self._send(self._reply(request))
        return replies == 1

    def _reply(self, request: Request) -> bytes:
        if not self._extended and not self._structured:
            data = bytes(request.length) if request.type == Cmd.READ else b""
            return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie) + data
        pieces = self._pieces(request)
        if self._random.random() < 0.1:
            pieces.append((ReplyType.ERROR, wire.ERROR_PAYLOAD.pack(Errno.EIO, 2) + b"no"))
        if self._random.random() < 0.05:
            pieces += pieces
        said = [chunk(request, *each, extended=self._extended, done=False) for each in pieces]
        return b"".join([*said, chunk(request, ReplyType.NONE, extended=self._extended)])

    def _pieces(self, request: Request) -> list[tuple[ReplyType, bytes]]:
        half = request.length // 2
        offset, middle = request.offset, request.offset + half
        if request.type == Cmd.READ and half:
            data = wire.OFFSET.pack(middle) + bytes(request.length - half)
            return [
                (ReplyType.OFFSET_HOLE, hole(offset, half)),
                (ReplyType.OFFSET_DATA, data),
            ]
        if request.type == Cmd.READ:
            return [(ReplyType.OFFSET_DATA, wire.OFFSET.pack(offset) + bytes(request.length))]
        if request.type != Cmd.BLOCK_STATUS:
            return []
        count = self._random.choice([1, 2, 1000, 100_000])
        runs = Runs([4096] * count, [0, 3] * (count // 2) + [0] * (count % 2))
        kind = ReplyType.BLOCK_STATUS_EXT if self._extended else ReplyType.BLOCK_STATUS
        return [(kind, status(7, runs, extended=self._extended))]


class NbdClientTarget:
    """Each round is a node over a hostile server, and what one does with a node."""

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        self._qmp = stack.enter_context(QmpClient(daemon.qmp_path))
        self._path = str(daemon.directory / "hostile.sock")
        self._ours = str(daemon.directory / "nbd.sock")
        self._listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listening.bind(self._path)
        self._listening.listen(16)
        self._round = 0
        self._qmp.execute(
            "nbd-server-start", {"addr": {"type": "unix", "data": {"path": self._ours}}}
        )

    def last_input(self) -> str:
        return f"server's seed {self._round}"

    def play(self, random: Random) -> None:
        self._round = random.getrandbits(64)
        goes_on, end = socket.socketpair()
        server = threading.Thread(target=self._serve, args=(Random(self._round), goes_on))
        server.start()
        try:
            self._use(random)
        finally:
            end.close()
            server.join()
            goes_on.close()

    def _serve(self, random: Random, goes_on: socket.socket) -> None:
        """One client after the other, until ``goes_on`` is hung up."""
        while True:
            readable, _, _ = select([self._listening, goes_on], [], [], PATIENCE_SECONDS)
            if self._listening not in readable:
                return
            client, _ = self._listening.accept()
            with client, suppress(EOFError, OSError):
                client.settimeout(PATIENCE_SECONDS)
                Hostile(client, random).serve()

    def _use(self, random: Random) -> None:
        server = {"type": "unix", "path": self._path}
        node = {"driver": "nbd", "node-name": "disk", "server": server}
        export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
        with suppress(QmpError):
            self._qmp.execute("blockdev-add", node)
        if not self._qmp.execute("query-named-block-nodes"):
            return
        self._qmp.execute("block-export-add", export)
        with NbdClient.open(self._ours, "disk") as client:
            for _ in range(random.randrange(10)):
                for result in client.pipeline([a_call(random) for _ in range(4)]):
                    assert isinstance(result, NbdError | bytes)
            client.disconnect()
        self._qmp.execute("block-export-del", {"id": "export", "mode": "hard"})
        # It is gone also where it could not be flushed any more.
        with suppress(QmpError):
            self._qmp.execute("blockdev-del", {"node-name": "disk"})
        assert not self._qmp.execute("query-named-block-nodes")
        self._qmp.events.clear()

    def settle(self, qmp: QmpClient) -> None:
        """There is nothing to take back."""


def a_call(random: Random) -> Call:
    cmd = random.choice([Cmd.READ, Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM, Cmd.FLUSH])
    length = random.choice([1, 512, 4096, 70_000])
    offset = random.randrange(SIZE - length)
    if cmd == Cmd.FLUSH:
        return Call(cmd)
    return Call(cmd, offset, length, data=bytes(length) if cmd == Cmd.WRITE else b"")
