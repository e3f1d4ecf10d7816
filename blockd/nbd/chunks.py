"""Replies in chunks: their headers of both forms, and what is in them.

Source: ``doc/proto.md``, "Structured reply types"; "Extended reply chunk message" in its branch
``extension-ext-header``. What parses raises ``ProtocolError`` for what can't be.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.wire import Headers, ProtocolError, ReplyFlag, ReplyType, Request

_STATUS: Final = Struct(">I")  # context
_EXTENDED_STATUS: Final = Struct(">II")  # context, how many runs
_FILTER: Final = Struct(">Q")  # length; the contexts follow
_ERROR_BIT: Final = 1 << 15


class Chunk(NamedTuple):
    """A chunk's header. ``offset`` is the request's, where the header repeats it."""

    flags: int
    type: int
    cookie: int
    offset: int | None
    length: int


class Runs(NamedTuple):
    """A block status: consecutive runs by their ``lengths`` in bytes, and the ``flags`` of each."""

    lengths: Sequence[int]
    flags: Sequence[int]


# --- headers ---------------------------------------------------------------------------------


def chunk(
    request: Request, kind: int, payload: bytes = b"", *, extended: bool, done: bool = True
) -> bytes:
    """One chunk of the reply to ``request``; ``done``: the last."""
    flags = ReplyFlag.DONE if done else 0
    if extended:
        head = wire.EXTENDED_HEADER.pack(
            wire.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload)
        )
    else:
        head = wire.STRUCTURED_HEADER.pack(
            wire.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload)
        )
    return head + payload


def parse_chunk(head: bytes | memoryview, *, extended: bool) -> Chunk:
    """A whole header."""
    if extended:
        magic, flags, kind, cookie, offset, length = wire.EXTENDED_HEADER.unpack(head)
        expected = wire.EXTENDED_REPLY_MAGIC
    else:
        magic, flags, kind, cookie, length = wire.STRUCTURED_HEADER.unpack(head)
        expected, offset = wire.STRUCTURED_REPLY_MAGIC, None
    if magic != expected:
        raise ProtocolError(f"bad reply magic 0x{magic:08x}")
    return Chunk(flags, kind, cookie, offset, length)


# --- errors ----------------------------------------------------------------------------------


def error_reply(
    request: Request, errno: int | None, message: str, headers: Headers, *, at: int | None = None
) -> bytes:
    """The whole (or the end of a) reply to a request that failed.

    Args:
        request: the one that failed.
        errno: the host's error number, an ``OSError.errno``.
        message: for the user; a simple reply has no room for it.
        headers: what was negotiated.
        at: where on the export a READ failed, if known; what was sent of it below is valid.
    """
    error = wire.nbd_errno(errno)
    if headers is Headers.SIMPLE:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, request.cookie)
    text = wire.encode_string(message, limits.NBD_STRING_BYTES)
    payload = wire.ERROR_PAYLOAD.pack(error, len(text)) + text
    kind = ReplyType.ERROR
    if at is not None:
        kind, payload = ReplyType.ERROR_OFFSET, payload + wire.OFFSET.pack(at)
    return chunk(request, kind, payload, extended=headers is Headers.EXTENDED)


def is_error(kind: int) -> bool:
    """Whether a chunk of this type, known or not, tells of an error."""
    return bool(kind & _ERROR_BIT)


def parse_error(payload: bytes | memoryview) -> tuple[int, str]:
    """The number and the message in an error chunk of any type."""
    fixed = wire.ERROR_PAYLOAD.size
    if len(payload) < fixed:
        raise ProtocolError(f"an error in {len(payload)} bytes")
    error, length = wire.ERROR_PAYLOAD.unpack_from(payload)
    if length > len(payload) - fixed:
        raise ProtocolError("an error's message is longer than its chunk")
    if not error:
        raise ProtocolError("an error that is none")
    return error, bytes(payload[fixed : fixed + length]).decode(errors="replace")


# --- holes -----------------------------------------------------------------------------------


def hole(offset: int, length: int) -> bytes:
    """The payload of OFFSET_HOLE."""
    return wire.HOLE.pack(offset, length)


def parse_hole(payload: bytes | memoryview) -> tuple[int, int]:
    """Offset and length."""
    if len(payload) != wire.HOLE.size:
        raise ProtocolError(f"a hole in {len(payload)} bytes")
    offset, length = wire.HOLE.unpack(payload)
    return offset, length


# --- block status ----------------------------------------------------------------------------


def status(context: int, runs: Runs, *, extended: bool) -> bytes:
    """The payload of BLOCK_STATUS, or BLOCK_STATUS_EXT: ``runs`` has one run at least."""
    count = len(runs.lengths)
    numbers = array("Q" if extended else "I", bytes((16 if extended else 8) * count))
    numbers[::2] = _as_array(numbers.typecode, runs.lengths)
    numbers[1::2] = _as_array(numbers.typecode, runs.flags)
    if sys.byteorder == "little":
        numbers.byteswap()
    head = _EXTENDED_STATUS.pack(context, count) if extended else _STATUS.pack(context)
    return head + numbers.tobytes()


def _as_array(typecode: str, numbers: Sequence[int]) -> array[int]:
    """A conversion would take some ms for the longest block status."""
    if isinstance(numbers, array) and numbers.typecode == typecode:
        return numbers
    return array(typecode, numbers)


def parse_status(payload: bytes | memoryview, *, extended: bool) -> tuple[int, Runs]:
    """The context, and its runs."""
    head = _EXTENDED_STATUS if extended else _STATUS
    entry_bytes = 16 if extended else 8
    count, odd = divmod(len(payload) - head.size, entry_bytes)
    if count < 1 or odd:
        raise ProtocolError(f"a block status in {len(payload)} bytes")
    context, *told = head.unpack_from(payload)
    if told and told != [count]:
        raise ProtocolError(f"a block status of {told[0]} runs has {count}")
    numbers = array("Q" if extended else "I", bytes(payload[head.size :]))
    if sys.byteorder == "little":
        numbers.byteswap()
    lengths = numbers[::2]
    if not all(lengths):
        raise ProtocolError("a block status with an empty run")
    return context, Runs(lengths, numbers[1::2])


def status_filter(length: int, contexts: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS request that wants to hear of some contexts only."""
    return _FILTER.pack(length) + b"".join(wire.U32.pack(context) for context in contexts)


def parse_status_filter(payload: bytes | memoryview) -> tuple[int, list[int]] | None:
    """Its length and contexts; None where it has no such form."""
    if len(payload) < _FILTER.size or (len(payload) - _FILTER.size) % wire.U32.size:
        return None
    (length,) = _FILTER.unpack_from(payload)
    return length, [context for (context,) in wire.U32.iter_unpack(payload[_FILTER.size :])]
