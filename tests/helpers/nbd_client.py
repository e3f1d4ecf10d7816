"""A small NBD client: one connection, one thread, strict about what the server may send.

Whatever receives raises EOFError when the server has closed, ProtocolError for nonsense.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.chunks import parse_chunk, status_filter
from blockd.nbd.options import meta_data, parse_meta_context
from blockd.nbd.wire import ClientFlag, Cmd, Errno, Option, ProtocolError, Rep, ReplyFlag
from tests.helpers.nbd_codec import (
    Call,
    ExportReply,
    NbdError,
    Pending,
    info_bytes,
    option_bytes,
    parse_infos,
    parse_server,
    request_bytes,
)
from tests.helpers.patience import PATIENCE_SECONDS

FIXED_NO_ZEROES = ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES


class Stream(Protocol):
    """What the client needs of a socket."""

    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class NbdClient:
    """A connection whose greeting has been answered; options are to be haggled."""

    def __init__(self, stream: Stream, *, flags: int = FIXED_NO_ZEROES) -> None:
        self.stream = stream
        self.structured = self.extended = False
        self._no_zeroes = bool(flags & ClientFlag.C_NO_ZEROES)
        self._pending: dict[int, Pending] = {}
        self._done: dict[int, Pending] = {}
        self._cookie = 0
        password, magic, _ = wire.GREETING.unpack(self.receive(wire.GREETING.size))
        if (password, magic) != (wire.INIT_PASSWD, wire.OPTION_MAGIC):
            raise ProtocolError("not a newstyle greeting")
        self.send(wire.CLIENT_FLAGS.pack(flags))

    @classmethod
    def connect(cls, address: str | tuple[str, int], *, flags: int = FIXED_NO_ZEROES) -> NbdClient:
        """``address``: a Unix socket's path, or host and port."""
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            sock.settimeout(PATIENCE_SECONDS)
            sock.connect(address)
            return cls(sock, flags=flags)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def open(
        cls,
        address: str | tuple[str, int],
        export: str,
        *contexts: str,
        structured: bool = True,
        extended: bool = False,
    ) -> NbdClient:
        """Connect and go; requests may follow."""
        client = cls.connect(address)
        try:
            if extended:
                client.extended_headers()
            elif structured:
                client.structured_replies()
            if contexts:
                client.set_contexts(export, *contexts)
            client.go(export)
        except BaseException:
            client.close()
            raise
        return client

    @classmethod
    def open_tls(cls, path: str, export: str, credentials: Path) -> NbdClient:
        """As ``open``, encrypted; the server's certificate is for localhost."""
        context = ssl.create_default_context(cafile=credentials / "ca-cert.pem")
        context.load_cert_chain(credentials / "client-cert.pem", credentials / "client-key.pem")
        client = cls.connect(path)
        try:
            client.option(Option.STARTTLS)
            assert isinstance(client.stream, socket.socket)
            client.stream = context.wrap_socket(client.stream, server_hostname="localhost")
            client.structured_replies()
            client.go(export)
        except BaseException:
            client.close()
            raise
        return client

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.stream.sendall(data)

    def receive(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        data = bytearray()
        while len(data) < count:
            piece = self.stream.recv(count - len(data))
            if not piece:
                raise EOFError(f"{count - len(data)} of {count} bytes missing")
            data += piece
        return bytes(data)

    def at_end(self) -> bool:
        """Wait for the server: does it close the connection rather than send something?"""
        try:
            return not self.stream.recv(1)
        except ConnectionError:
            return True

    def option(self, option: int, data: bytes = b"") -> list[bytes]:
        """Send an option; the data of the replies before the ACK. Raises NbdError."""
        self.send(option_bytes(option, data))
        replies: list[bytes] = []
        while True:
            head = self.receive(wire.OPTION_REPLY.size)
            magic, answered, kind, length = wire.OPTION_REPLY.unpack(head)
            if (magic, answered) != (wire.OPTION_REPLY_MAGIC, option):
                raise ProtocolError(f"not a reply to option {option}: {head.hex()}")
            payload = self.receive(length)
            if kind == Rep.ACK:
                return replies
            if kind >= Rep.ERR_UNSUP:
                raise NbdError(Rep(kind), payload.decode())
            replies.append(payload)

    def list_exports(self) -> list[tuple[str, str]]:
        """Name and description of each export."""
        return [parse_server(data) for data in self.option(Option.LIST)]

    def structured_replies(self) -> None:
        self.option(Option.STRUCTURED_REPLY)
        self.structured = True

    def extended_headers(self) -> None:
        self.option(Option.EXTENDED_HEADERS)
        self.extended = True

    def list_contexts(self, name: str, *queries: str) -> list[str]:
        """The meta contexts of an export."""
        replies = self.option(Option.LIST_META_CONTEXT, meta_data(name, queries))
        return [context for _, context in map(parse_meta_context, replies)]

    def set_contexts(self, name: str, *queries: str) -> dict[str, int]:
        """Select meta contexts; their numbers."""
        replies = self.option(Option.SET_META_CONTEXT, meta_data(name, queries))
        return {context: number for number, context in map(parse_meta_context, replies)}

    def info(self, name: str, *requests: int, option: Option = Option.INFO) -> ExportReply:
        return parse_infos(self.option(option, info_bytes(name.encode(), *requests)))

    def go(self, name: str, *requests: int) -> ExportReply:
        return self.info(name, *requests, option=Option.GO)

    def export_name(self, name: str) -> ExportReply:
        """The old way to enter transmission. Raises EOFError for an unknown export."""
        self.send(option_bytes(Option.EXPORT_NAME, name.encode()))
        reply = wire.EXPORT_NAME_REPLY.unpack(self.receive(wire.EXPORT_NAME_REPLY.size))
        if not self._no_zeroes and any(self.receive(wire.EXPORT_NAME_ZEROES_BYTES)):
            raise ProtocolError("the zeroes are none")
        return ExportReply(*reply)

    def submit(self, call: Call) -> int:
        """Send one request; its cookie, to ``wait`` for."""
        self._cookie += 1
        # What is longer is refused.
        reads = call.cmd == Cmd.READ and call.length <= limits.NBD_PAYLOAD_BYTES
        data = bytearray(call.length if reads else 0)
        self._pending[self._cookie] = Pending(call, data)
        self.send(request_bytes(call, self._cookie, extended=self.extended))
        return self._cookie

    def pending(self, cookie: int) -> Pending:
        """A request that was submitted, to be watched."""
        return self._pending[cookie]

    def wait(self, cookie: int) -> bytes:
        """A request's data, empty for all but READ. Raises NbdError."""
        return bytes(self._wait(cookie).data)

    def _wait(self, cookie: int) -> Pending:
        while cookie not in self._done:
            self._receive_reply()
        pending = self._done.pop(cookie)
        if pending.error is not None:
            raise pending.error
        return pending

    def pipeline(self, calls: Iterable[Call], *, depth: int = 32) -> list[bytes | NbdError]:
        """Run requests, ``depth`` in flight; their results in the order of the calls."""
        done = self.run_all(calls, depth=depth)
        return [pending.error or bytes(pending.data) for pending in done]

    def run_all(self, calls: Iterable[Call], *, depth: int) -> list[Pending]:
        """As ``pipeline``, with all that was answered."""
        cookies = []
        for call in calls:
            while len(self._pending) >= depth:
                self._receive_reply()
            cookies.append(self.submit(call))
        while self._pending:
            self._receive_reply()
        return [self._done.pop(cookie) for cookie in cookies]

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self.wait(self.submit(Call(Cmd.READ, offset, length, flags)))

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.wait(self.submit(Call(Cmd.WRITE, offset, flags=flags, data=data)))

    def flush(self) -> None:
        self.wait(self.submit(Call(Cmd.FLUSH)))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.wait(self.submit(Call(Cmd.TRIM, offset, length, flags)))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.wait(self.submit(Call(Cmd.WRITE_ZEROES, offset, length, flags)))

    def cache(self, offset: int, length: int) -> None:
        self.wait(self.submit(Call(Cmd.CACHE, offset, length)))

    def block_status(
        self, offset: int, length: int, flags: int = 0, *, contexts: Iterable[int] | None = None
    ) -> dict[int, list[tuple[int, int]]]:
        """Length and flags of each run, by context; ``contexts``: of these alone."""
        data = b"" if contexts is None else status_filter(length, [*contexts])
        call = Call(Cmd.BLOCK_STATUS, offset, length, flags, data)
        return self._wait(self.submit(call)).statuses

    def disconnect(self) -> None:
        """Say goodbye; the server answers by closing."""
        self.send(request_bytes(Call(Cmd.DISC), 0, extended=self.extended))
        if not self.at_end():
            raise ProtocolError("an answer to DISC")
        self.close()

    def _receive_reply(self) -> None:
        """One simple reply or one chunk."""
        if self.extended:
            self._receive_chunk(self.receive(wire.EXTENDED_HEADER.size))
            return
        head = self.receive(wire.SIMPLE_REPLY.size)
        magic, errno, cookie = wire.SIMPLE_REPLY.unpack(head)
        if magic == wire.STRUCTURED_REPLY_MAGIC and self.structured:
            self._receive_chunk(head + self.receive(wire.STRUCTURED_HEADER.size - len(head)))
            return
        if magic != wire.SIMPLE_REPLY_MAGIC or cookie not in self._pending:
            raise ProtocolError(f"reply magic 0x{magic:08x}, cookie {cookie}")
        pending = self._pending[cookie]
        if pending.call.cmd == Cmd.READ and self.structured:
            raise ProtocolError("a simple reply to READ")
        if errno:
            pending.error = NbdError(Errno(errno), "")
        else:
            pending.data[:] = self.receive(len(pending.data))
        self._done[cookie] = self._pending.pop(cookie)

    def _receive_chunk(self, head: bytes) -> None:
        flags, kind, cookie, offset, length = parse_chunk(head, extended=self.extended)
        payload = self.receive(length)
        if cookie not in self._pending:
            raise ProtocolError(f"a chunk for nothing: cookie {cookie}")
        pending = self._pending[cookie]
        if offset not in {None, pending.call.offset}:
            raise ProtocolError(f"a chunk for offset {offset}")
        pending.take_chunk(kind, payload, done=bool(flags & ReplyFlag.DONE))
        if flags & ReplyFlag.DONE:
            self._done[cookie] = self._pending.pop(cookie)
