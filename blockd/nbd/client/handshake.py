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
from blockd.nbd.options import BASE_ALLOCATION, info_data, meta_data, parse_meta_context
from blockd.nbd.wire import (
    HandshakeFlag,
    Headers,
    Info,
    Option,
    ProtocolError,
    Rep,
    TransmissionFlag,
)


@dataclass(frozen=True, slots=True)
class Export:
    """What the server offers. ``context_id``: of the meta context that was asked for, if it has it.

    ``minimum_bytes``: requests are whole blocks of that size. ``maximum_bytes``: the longest read
    or write, a multiple of the size of block that the server prefers.
    """

    size_bytes: int
    flags: TransmissionFlag
    headers: Headers = Headers.SIMPLE
    context_id: int | None = None
    minimum_bytes: int = 1
    maximum_bytes: int = limits.NBD_PAYLOAD_BYTES

    @property
    def extended(self) -> bool:
        return self.headers is Headers.EXTENDED


class RefusedError(BlockdError):
    """The server has refused an option."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind


async def negotiate(
    stream: Stream, name: str, tls: Tls | None = None, *, context: str = BASE_ALLOCATION
) -> Export:
    """Enter transmission, with the meta context ``context`` where the server has it.

    Raises ``OSError``, ``ProtocolError``, or ``BlockdError``: refused.
    """
    greeting = wire.GREETING.unpack(await stream.take(wire.GREETING.size))
    password, magic, flags = greeting
    if (password, magic) != (wire.INIT_PASSWD, wire.OPTION_MAGIC):
        raise ProtocolError("Server does not speak the NBD protocol that is in use since 2010")
    # The client's flags have the numbers of those that they answer.
    flags &= HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
    await stream.send(wire.CLIENT_FLAGS.pack(flags))
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        if tls is not None:
            raise ProtocolError("Server does not support fixed newstyle negotiation, nor TLS")
        size, transmission_flags = await _enter_by_name(stream, name, no_zeroes=no_zeroes)
        return _export(size, transmission_flags)
    if tls is not None:
        await _ask(stream, Option.STARTTLS)
        await tls.start(stream)
    headers = await _best_headers(stream)
    context_id = await _context(stream, name, context) if headers else None
    try:
        infos = await _ask(stream, Option.GO, info_data(name, [Info.BLOCK_SIZE]))
    except RefusedError as refusal:
        if refusal.kind != Rep.ERR_UNSUP:
            raise
        size, transmission_flags = await _enter_by_name(stream, name, no_zeroes=no_zeroes)
        return _export(size, transmission_flags, headers, context_id)
    return _read_infos(infos, headers, context_id)


async def _ask(stream: Stream, option: Option, data: bytes = b"") -> list[tuple[int, bytes]]:
    """Type and data of each reply before the ACK. Raises ``RefusedError``."""
    await stream.send(wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, option, len(data)), data)
    replies: list[tuple[int, bytes]] = []
    total_bytes = 0
    while True:
        magic, answered, kind, length = wire.OPTION_REPLY.unpack(
            await stream.take(wire.OPTION_REPLY.size)
        )
        if (magic, answered) != (wire.OPTION_REPLY_MAGIC, option):
            raise ProtocolError("Unexpected option reply")
        total_bytes += wire.OPTION_REPLY.size + length
        if total_bytes > limits.NBD_OPTION_DATA_BYTES:
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


async def _best_headers(stream: Stream) -> Headers:
    if await _granted(stream, Option.EXTENDED_HEADERS):
        return Headers.EXTENDED
    if await _granted(stream, Option.STRUCTURED_REPLY):
        return Headers.STRUCTURED
    return Headers.SIMPLE


async def _context(stream: Stream, name: str, wanted: str) -> int | None:
    try:
        replies = await _ask(stream, Option.SET_META_CONTEXT, meta_data(name, [wanted]))
    except RefusedError:
        return None
    for kind, payload in replies:
        if kind != Rep.META_CONTEXT:
            raise ProtocolError("Unexpected reply to the choice of a meta context")
        number, context = parse_meta_context(payload)
        if context == wanted:
            return number
    return None


async def _enter_by_name(stream: Stream, name: str, *, no_zeroes: bool) -> tuple[int, int]:
    """The old way, which a server refuses by hanging up; size and flags of the export."""
    data = name.encode()
    header = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, Option.EXPORT_NAME, len(data))
    await stream.send(header, data)
    size, flags = wire.EXPORT_NAME_REPLY.unpack(await stream.take(wire.EXPORT_NAME_REPLY.size))
    if not no_zeroes:
        await stream.take(wire.EXPORT_NAME_ZEROES_BYTES)
    return size, flags


def _read_infos(infos: list[tuple[int, bytes]], headers: Headers, context_id: int | None) -> Export:
    size = flags = None
    block_sizes = (1, 1, limits.NBD_PAYLOAD_BYTES)
    for kind, payload in infos:
        if kind != Rep.INFO or len(payload) < wire.U16.size:
            raise ProtocolError("Unexpected reply to the choice of an export")
        (what,) = wire.U16.unpack_from(payload)
        if what == Info.EXPORT and len(payload) == wire.INFO_EXPORT.size:
            _, size, flags = wire.INFO_EXPORT.unpack(payload)
        elif what == Info.BLOCK_SIZE and len(payload) == wire.INFO_BLOCK_SIZE.size:
            _, *sizes = wire.INFO_BLOCK_SIZE.unpack(payload)
            block_sizes = (sizes[0], sizes[1], sizes[2])
    if size is None or flags is None:
        raise ProtocolError("Server did not tell the export's size")
    return _export(size, flags, headers, context_id, block_sizes)


def _export(
    size: int,
    flags: int,
    headers: Headers = Headers.SIMPLE,
    context_id: int | None = None,
    block_sizes: tuple[int, int, int] = (1, 1, limits.NBD_PAYLOAD_BYTES),
) -> Export:
    """``block_sizes``: minimum, preferred and maximum, as the server told them."""
    minimum, preferred, maximum = block_sizes
    if not minimum or minimum & (minimum - 1) or minimum > limits.NBD_CLIENT_BLOCK_BYTES:
        raise ProtocolError(f"Server's minimum block size {minimum} is not usable")
    if maximum < minimum:
        raise ProtocolError(f"Server's maximum block size {maximum} is below its minimum")
    if size % minimum:
        raise ProtocolError(f"Export size {size} is not a multiple of minimum block size {minimum}")
    if size > limits.NODE_BYTES:
        raise ProtocolError(f"Export size {size} is too large")
    longest = min(maximum, limits.NBD_PAYLOAD_BYTES)
    # A preferred size that makes no sense is none.
    unit = preferred if minimum <= preferred <= longest and not preferred % minimum else minimum
    return Export(
        size, TransmissionFlag(flags), headers, context_id, minimum, longest // unit * unit
    )
