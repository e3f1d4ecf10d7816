"""The client's haggling: to the export, with all that makes its use better.

Source: ``doc/proto.md``, "Newstyle negotiation", "Option types".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blockd import limits
from blockd.errors import BlockdError
from blockd.nbd import wire
from blockd.nbd.client.stream import Stream
from blockd.nbd.client.tls import Tls
from blockd.nbd.wire import ClientFlag, Info, Option, ProtocolError, Rep, TransmissionFlag

BASE_ALLOCATION: Final = "base:allocation"
_META_CONTEXT = wire.U32


@dataclass(frozen=True, slots=True)
class Export:
    """What the server offers. ``allocation_id``: the meta context's, where it has one."""

    size_bytes: int
    flags: TransmissionFlag
    structured: bool = False
    allocation_id: int | None = None
    minimum_bytes: int = 1
    maximum_bytes: int = limits.NBD_PAYLOAD_BYTES


class RefusedError(BlockdError):
    """The server has refused an option."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind


async def negotiate(stream: Stream, name: str, tls: Tls | None = None) -> Export:
    """Enter transmission. Raises ``OSError``, ``ProtocolError``, or ``BlockdError``: refused."""
    greeting = wire.GREETING.unpack(await stream.take(wire.GREETING.size))
    password, magic, flags = greeting
    if (password, magic) != (wire.INIT_PASSWD, wire.OPTION_MAGIC):
        raise ProtocolError("Server does not speak the NBD protocol that is in use since 2010")
    if not flags & wire.HandshakeFlag.FIXED_NEWSTYLE:
        raise ProtocolError("Server does not support fixed newstyle negotiation")
    no_zeroes = flags & wire.HandshakeFlag.NO_ZEROES
    await stream.send(wire.CLIENT_FLAGS.pack(ClientFlag.C_FIXED_NEWSTYLE | no_zeroes))
    if tls is not None:
        await _ask(stream, Option.STARTTLS)
        await tls.start(stream)
    structured = await _granted(stream, Option.STRUCTURED_REPLY)
    allocation_id = await _allocation_context(stream, name) if structured else None
    try:
        infos = await _ask(stream, Option.GO, _go_data(name))
    except RefusedError as refusal:
        if refusal.kind != Rep.ERR_UNSUP:
            raise
        return await _enter_by_name(stream, name, no_zeroes=bool(no_zeroes))
    return _read_infos(infos, structured=structured, allocation_id=allocation_id)


async def _ask(stream: Stream, option: Option, data: bytes = b"") -> list[tuple[int, bytes]]:
    """Type and data of each reply before the ACK. Raises ``RefusedError``."""
    await stream.send(wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, option, len(data)), data)
    replies: list[tuple[int, bytes]] = []
    while True:
        magic, answered, kind, length = wire.OPTION_REPLY.unpack(
            await stream.take(wire.OPTION_REPLY.size)
        )
        if (magic, answered) != (wire.OPTION_REPLY_MAGIC, option):
            raise ProtocolError("Unexpected option reply")
        if length > limits.NBD_OPTION_DATA_BYTES or len(replies) > limits.NBD_OPTIONS_LIMIT:
            raise ProtocolError("Option reply is too long")
        payload = bytes(await stream.take(length))
        if kind == Rep.ACK:
            return replies
        if kind & _ERROR_BIT:
            raise _refusal(option, kind, payload.decode(errors="replace"))
        replies.append((kind, payload))


_ERROR_BIT: Final = 1 << 31
#: What QEMU's client says; the server's own message follows where there is one.
_SENTENCES: Final[dict[int, str]] = {
    Rep.ERR_UNSUP: "Server doesn't support option",
    Rep.ERR_POLICY: "Denied by server for option",
    Rep.ERR_INVALID: "Invalid parameters for option",
    Rep.ERR_PLATFORM: "Server lacks support for option",
    Rep.ERR_TLS_REQD: "TLS negotiation required before option",
    Rep.ERR_SHUTDOWN: "Server shutting down before option",
    Rep.ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for option",
}


def _refusal(option: Option, kind: int, said: str) -> RefusedError:
    if kind == Rep.ERR_UNKNOWN:
        return RefusedError(kind, "Requested export not available")
    sentence = _SENTENCES.get(kind, "Unknown error for option")
    hint = f": {said}" if said else ""
    name = option.name.lower().replace("_", " ")
    return RefusedError(kind, f"{sentence} {option.value} ({name}){hint}")


async def _granted(stream: Stream, option: Option) -> bool:
    try:
        await _ask(stream, option)
    except RefusedError:
        return False
    return True


async def _allocation_context(stream: Stream, name: str) -> int | None:
    export, query = name.encode(), BASE_ALLOCATION.encode()
    data = wire.U32.pack(len(export)) + export + wire.U32.pack(1)
    data += wire.U32.pack(len(query)) + query
    try:
        replies = await _ask(stream, Option.SET_META_CONTEXT, data)
    except RefusedError:
        return None
    for kind, payload in replies:
        if kind == Rep.META_CONTEXT and payload[_META_CONTEXT.size :] == query:
            (number,) = _META_CONTEXT.unpack_from(payload)
            return int(number)
    return None


def _go_data(name: str) -> bytes:
    export = name.encode()
    asked = wire.U16.pack(1) + wire.U16.pack(Info.BLOCK_SIZE)
    return wire.U32.pack(len(export)) + export + asked


async def _enter_by_name(stream: Stream, name: str, *, no_zeroes: bool) -> Export:
    """The old way, which a server refuses by hanging up."""
    data = name.encode()
    header = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, Option.EXPORT_NAME, len(data))
    await stream.send(header, data)
    size, flags = wire.EXPORT_NAME_REPLY.unpack(await stream.take(wire.EXPORT_NAME_REPLY.size))
    if not no_zeroes:
        await stream.take(wire.EXPORT_NAME_ZEROES_BYTES)
    return Export(size, TransmissionFlag(flags))


def _read_infos(
    infos: list[tuple[int, bytes]], *, structured: bool, allocation_id: int | None
) -> Export:
    size = flags = None
    minimum, maximum = 1, limits.NBD_PAYLOAD_BYTES
    for kind, payload in infos:
        if kind != Rep.INFO or len(payload) < wire.U16.size:
            raise ProtocolError("Unexpected reply to the choice of an export")
        (what,) = wire.U16.unpack_from(payload)
        if what == Info.EXPORT and len(payload) == wire.INFO_EXPORT.size:
            _, size, flags = wire.INFO_EXPORT.unpack(payload)
        elif what == Info.BLOCK_SIZE and len(payload) == wire.INFO_BLOCK_SIZE.size:
            _, minimum, _, maximum = wire.INFO_BLOCK_SIZE.unpack(payload)
    if size is None or flags is None:
        raise ProtocolError("Server did not tell the export's size")
    _check_block_sizes(size, minimum, maximum)
    return Export(
        size,
        TransmissionFlag(flags),
        structured,
        allocation_id,
        minimum,
        min(maximum // minimum * minimum, limits.NBD_PAYLOAD_BYTES),
    )


def _check_block_sizes(size: int, minimum: int, maximum: int) -> None:
    if not minimum or minimum & (minimum - 1) or minimum > limits.NBD_CLIENT_BLOCK_BYTES:
        raise ProtocolError(f"Server's minimum block size {minimum} is not usable")
    if maximum < minimum:
        raise ProtocolError(f"Server's maximum block size {maximum} is below its minimum")
    if size % minimum:
        raise ProtocolError(f"Export size {size} is not a multiple of minimum block size {minimum}")
    if size > limits.NODE_BYTES:
        raise ProtocolError(f"Export size {size} is too large")
