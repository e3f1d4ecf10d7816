"""NBD's numbers and messages: what goes over the wire, and nothing about when.

Source: ``doc/proto.md`` of the NetworkBlockDevice/nbd repository; sections are named below. The
constants keep NBD's names without their ``NBD_`` prefixes. All numbers are big-endian.
"""

from __future__ import annotations

import errno as os_errno
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple


class ProtocolError(Exception):
    """The other end broke a rule, and its bytes make no sense any more: disconnecting is left."""


# --- handshake phase ("Newstyle negotiation", "Option types", "Option reply types") -----------

INIT_PASSWD: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = Struct(">QQH")  # INIT_PASSWD, OPTION_MAGIC, HandshakeFlag
CLIENT_FLAGS: Final = Struct(">I")
OPTION_HEADER: Final = Struct(">QII")  # OPTION_MAGIC, option, length of its data
OPTION_REPLY: Final = Struct(">QIII")  # OPTION_REPLY_MAGIC, option, reply type, length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size in bytes, TransmissionFlag
EXPORT_NAME_ZEROES_BYTES: Final = 124
INFO_EXPORT: Final = Struct(">HQH")  # Info.EXPORT, size in bytes, TransmissionFlag
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, maximum
U16: Final = Struct(">H")
U32: Final = Struct(">I")


class HandshakeFlag(IntFlag):
    """What the server offers in its greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client takes of it."""

    C_FIXED_NEWSTYLE = 1 << 0
    C_NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do. HAS_FLAGS is always set."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client may ask for while haggling."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """The types of a reply to an option. Errors have bit 31 set; their data is a message."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    """The pieces of information about an export in answers to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


def option_reply(option: int, reply: Rep, data: bytes = b"") -> bytes:
    """One reply to an option, as sent to a fixed-newstyle client."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


# --- transmission phase ("Request message", "Structured reply types", "Request types") --------
# What concerns extended headers is in the branch ``extension-ext-header`` of that repository.

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REQUEST: Final = Struct(">IHHQQI")  # magic, CmdFlag, Cmd, cookie, offset, length
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")  # the same, with a longer length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, Errno or 0, cookie
STRUCTURED_HEADER: Final = Struct(">IHHQI")  # magic, ReplyFlag, ReplyType, cookie, length
#: Magic, ReplyFlag, ReplyType, cookie, the request's offset, length.
EXTENDED_HEADER: Final = Struct(">IHHQQQ")
#: A structured header and the payload's offset; the data follows. ``length`` counts offset + data.
OFFSET_DATA_HEADER: Final = Struct(">IHHQIQ")
EXTENDED_OFFSET_DATA_HEADER: Final = Struct(">IHHQQQQ")  # the same with an extended header
ERROR_PAYLOAD: Final = Struct(">IH")  # Errno, length of the message, which follows
OFFSET: Final = Struct(">Q")  # the end of an ERROR_OFFSET payload
HOLE: Final = Struct(">QI")  # an OFFSET_HOLE payload: offset, length
OFFSET_HOLE_CHUNK: Final = Struct(">IHHQIQI")  # a structured header and that
EXTENDED_OFFSET_HOLE_CHUNK: Final = Struct(">IHHQQQQI")  # the same with an extended header


class Headers(IntEnum):
    """What the messages look like: each includes what those before it can do."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class Cmd(IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(IntFlag):
    """How a request wants it done."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """DONE marks the last chunk of a structured reply."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """What a structured reply chunk holds. Errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


class State(IntFlag):
    """What ``base:allocation`` says of a run."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Errno(IntEnum):
    """The only error numbers that a reply may carry ("Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# The same as plain integers for the inner loop: an enum's member is slower to find and to compare.
CMD_READ: Final = Cmd.READ.value
CMD_WRITE: Final = Cmd.WRITE.value
DONE: Final = ReplyFlag.DONE.value
OFFSET_DATA: Final = ReplyType.OFFSET_DATA.value
OFFSET_HOLE: Final = ReplyType.OFFSET_HOLE.value

# EDQUOT and EFBIG: "Error values". EROFS and, below, EINVAL for all others: as QEMU answers.
_ERRNOS: Final = {error.value: error for error in Errno} | {
    os_errno.EROFS: Errno.EPERM,
    os_errno.EDQUOT: Errno.ENOSPC,
    os_errno.EFBIG: Errno.ENOSPC,
}


def nbd_errno(errno: int | None) -> Errno:
    """The number NBD has for an ``OSError.errno`` of this host; EINVAL where it has none."""
    return _ERRNOS.get(errno or 0, Errno.EINVAL)


def os_errno_of(error: int) -> int:
    """This host's number for one of NBD's; EINVAL for what NBD does not have, as in QEMU."""
    return error if error in _ERRNOS else Errno.EINVAL


class Request(NamedTuple):
    """A request's header. ``flags`` and ``type`` are as sent: they may be unknown to us."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int


def parse_request(
    buffer: bytes | bytearray | memoryview, position: int = 0, *, extended: bool = False
) -> Request | None:
    """The request whose header starts at ``position``; None while the header is incomplete.

    Raises:
        ProtocolError: there is no request: the magic number is wrong.
    """
    form, expected = _REQUESTS[extended]
    if len(buffer) - position < form.size:
        return None
    magic, *fields = form.unpack_from(buffer, position)
    if magic != expected:
        raise ProtocolError(f"bad request magic 0x{magic:08x}")
    return Request(*fields)


def request_header(request: Request, *, extended: bool = False) -> bytes:
    """A request as it is sent, without its payload."""
    form, magic = _REQUESTS[extended]
    return form.pack(magic, *request)


_REQUESTS: Final = {
    False: (REQUEST, REQUEST_MAGIC),
    True: (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC),
}


def encode_string(text: str, limit_bytes: int) -> bytes:
    """``text`` in UTF-8, cut to at most ``limit_bytes`` between two characters.

    What UTF-8 can't say (a file name's stray bytes) becomes ``?``.
    """
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return data
    return data[:limit_bytes].decode(errors="ignore").encode()
