"""The client's half of NBD's messages: what a client sends, and what it makes of the answers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from blockd.nbd import wire
from blockd.nbd.chunks import parse_status
from blockd.nbd.wire import Errno, Info, ProtocolError, Rep, ReplyType


class NbdError(Exception):
    """A request (``code``: Errno) or an option (Rep) was answered with an error."""

    def __init__(self, code: Errno | Rep, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


class Call(NamedTuple):
    """One request; ``data`` is a write's, and if there are any, ``length`` is theirs."""

    cmd: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""


class ExportReply(NamedTuple):
    """What the server told about an export; what it did not tell is None."""

    size_bytes: int
    flags: int
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, option, len(data)) + data


def info_bytes(name: bytes, *requests: int) -> bytes:
    """The data of INFO and GO."""
    listed = b"".join(wire.U16.pack(request) for request in requests)
    return wire.U32.pack(len(name)) + name + wire.U16.pack(len(requests)) + listed


def request_bytes(call: Call, cookie: int, *, extended: bool = False) -> bytes:
    """With extended headers, data are announced by a flag, as they must be."""
    length, flags = len(call.data) or call.length, call.flags
    if extended and call.data:
        flags |= wire.CmdFlag.PAYLOAD_LEN
    request = wire.Request(flags, call.cmd, cookie, call.offset, length)
    return wire.request_header(request, extended=extended) + call.data


def parse_server(data: bytes) -> tuple[str, str]:
    """Name and description in one reply to LIST."""
    end = 4 + int.from_bytes(data[:4])
    return data[4:end].decode(), data[end:].decode()


def parse_infos(replies: list[bytes]) -> ExportReply:
    """The replies to INFO or GO."""
    infos = {int.from_bytes(data[:2]): data[2:] for data in replies}
    export = ExportReply(*wire.EXPORT_NAME_REPLY.unpack(infos[Info.EXPORT]))
    if Info.NAME in infos:
        export = export._replace(name=infos[Info.NAME].decode())
    if Info.DESCRIPTION in infos:
        export = export._replace(description=infos[Info.DESCRIPTION].decode())
    if Info.BLOCK_SIZE in infos:
        export = export._replace(block_sizes=struct.unpack(">III", infos[Info.BLOCK_SIZE]))
    return export


@dataclass
class Pending:
    """A request in flight; ``data`` is as long as the READ, or empty."""

    call: Call
    data: bytearray
    covered_bytes: int = 0
    error: NbdError | None = None
    #: Length and flags of the runs of each context in a block status.
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    #: The types of the chunks that have come.
    kinds: set[int] = field(default_factory=set)

    def take_chunk(self, kind: int, payload: bytes, *, done: bool) -> None:
        """Take one structured reply chunk in. Raises ProtocolError for one that can't be."""
        self.kinds.add(kind)
        match kind:
            case ReplyType.NONE if done and not payload:
                pass
            case ReplyType.OFFSET_DATA if len(payload) > 8:
                self._cover(payload[:8], payload[8:])
            case ReplyType.OFFSET_HOLE if len(payload) == 12:
                self._cover(payload[:8], bytes(int.from_bytes(payload[8:])))
            case ReplyType.BLOCK_STATUS | ReplyType.BLOCK_STATUS_EXT:
                extended = kind == ReplyType.BLOCK_STATUS_EXT
                context, runs = parse_status(payload, extended=extended)
                if context in self.statuses:
                    raise ProtocolError(f"context {context} comes twice")
                self.statuses[context] = list(zip(runs.lengths, runs.flags, strict=True))
            case ReplyType.ERROR | ReplyType.ERROR_OFFSET if len(payload) >= 6:
                errno, size = wire.ERROR_PAYLOAD.unpack_from(payload)
                if len(payload) - 6 - size != (8 if kind == ReplyType.ERROR_OFFSET else 0):
                    raise ProtocolError("an error chunk of the wrong length")
                self.error = NbdError(Errno(errno), payload[6 : 6 + size].decode())
            case _:
                raise ProtocolError(f"chunk of type {kind}, {len(payload)} bytes")
        if done and not self.error and self.covered_bytes != len(self.data):
            raise ProtocolError("a READ succeeded without all its data")

    def _cover(self, offset: bytes, data: bytes) -> None:
        start = int.from_bytes(offset) - self.call.offset
        if not 0 <= start <= len(self.data) - len(data):
            raise ProtocolError("content outside the request")
        self.data[start : start + len(data)] = data
        self.covered_bytes += len(data)
