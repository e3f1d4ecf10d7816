"""The server's side of the NBD handshake, without I/O: bytes in, steps out.

A connection asks for the next step and does it: send these bytes, bring more, go over to
transmission, disconnect. It fetches bytes only when asked to, so a client that sends options
without waiting for the answers fills neither the input nor the output.

Source: ``doc/proto.md``, "Newstyle negotiation", "Fixed newstyle negotiation", "Termination of
the session during option haggling", "Option types". Where it leaves room, QEMU 10.0 is followed,
down to the messages.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, Protocol, TypeAlias

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.agreement import Agreement, ExportInfo
from blockd.nbd.options import (
    OptionError,
    matching,
    meta_context,
    option_label,
    parse_info,
    parse_meta,
    parse_name,
    unexpected_length,
)
from blockd.nbd.steps import (
    HardDisconnect,
    NeedData,
    Reply,
    SoftDisconnect,
    StartTls,
    Step,
    Transmission,
)
from blockd.nbd.wire import (
    ClientFlag,
    HandshakeFlag,
    Headers,
    Info,
    Option,
    Rep,
)


class Exports(Protocol):
    """The exports that a client may see; neither call waits."""

    def find(self, name: str) -> ExportInfo | None:
        """The export of this name; the empty name is an ordinary one."""

    def list(self) -> Iterable[ExportInfo]:
        """All exports, in the order of their creation."""


# --- states: what the machine waits for; an _End is a state too -------------------------------


@dataclass(frozen=True, slots=True)
class _Greeting:
    """Nothing: the greeting is still to be sent."""


@dataclass(frozen=True, slots=True)
class _Flags:
    """The client's flags."""


@dataclass(frozen=True, slots=True)
class _Header:
    """The header of an option."""


@dataclass(frozen=True, slots=True)
class _Data:
    """``length`` bytes of an option; all together they go into its answer."""

    length: int
    answer: Callable[[bytes], _Answer]


@dataclass(frozen=True, slots=True)
class _Waste:
    """``length`` bytes of an option that are thrown away as they come; then it is answered."""

    length: int
    answer: Callable[[bytes], _Answer]


_End: TypeAlias = Transmission | SoftDisconnect | HardDisconnect
_Answer: TypeAlias = Reply | StartTls | _End
_State: TypeAlias = _Greeting | _Flags | _Header | _Data | _Waste | _End


#: How an option is answered: the machine, the option, its data.
_Run: TypeAlias = "Callable[[Handshake, int, bytes], _Answer]"


class _Tls(enum.Enum):
    """proto.md, "NOTLS mode" and "FORCEDTLS mode", the latter before and after STARTTLS."""

    NONE = enum.auto()
    REQUIRED = enum.auto()
    ON = enum.auto()


class _Takes(enum.Enum):
    """What an option does with its data."""

    NOTHING = enum.auto()  # there must be none
    ANYTHING = enum.auto()  # it does not look at them
    DATA = enum.auto()
    NO_MORE = enum.auto()  # it is the last: it does not even wait for them


_NEED_DATA: Final = NeedData()
_HANDSHAKE_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
_GREETING: Final = Reply(wire.GREETING.pack(wire.INIT_PASSWD, wire.OPTION_MAGIC, _HANDSHAKE_FLAGS))
#: An int: the complement of an IntFlag lacks the bits that have no name.
_KNOWN_CLIENT_FLAGS: Final = (ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES).value


class Handshake:
    """One client's handshake. Never raises, whatever it is fed.

    Holds at most one option of ``limits.NBD_OPTION_DATA_BYTES`` and what was fed at once, as long
    as it is fed only after ``NeedData``.
    """

    def __init__(self, exports: Exports, *, tls: bool = False) -> None:
        """``tls``: the client must have it before it may do anything else."""
        self._exports = exports
        self._tls = _Tls.REQUIRED if tls else _Tls.NONE
        self._received = bytearray()
        self._state: _State = _Greeting()
        self._client_flags = ClientFlag(0)
        self._agreement = Agreement()
        self._options = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent."""
        self._received += data

    def step(self) -> Step:
        """What to do next. The last step, one of the three ends, is given again and again."""
        while True:
            match self._state:
                case _Greeting():
                    self._state = _Flags()
                    return _GREETING
                case _Flags():
                    step = self._take_flags()
                case _Header():
                    step = self._take_header()
                case _Data(length, answer):
                    step = self._take_data(length, answer)
                case _Waste(length, answer):
                    step = self._take_waste(length, answer)
                case Transmission() | SoftDisconnect() | HardDisconnect():
                    return self._state
            if step is not None:
                return step

    # Each _take gives a step, or None where only the state has changed.

    def _take_flags(self) -> Step | None:
        if len(self._received) < wire.CLIENT_FLAGS.size:
            return _NEED_DATA
        (flags,) = wire.CLIENT_FLAGS.unpack(self._take(wire.CLIENT_FLAGS.size))
        if flags & ~_KNOWN_CLIENT_FLAGS:  # "Client flags": MUST drop the connection
            return self._move(HardDisconnect(f"unknown client flags 0x{flags:x}"))
        self._client_flags = ClientFlag(flags)
        self._state = _Header()
        return None

    def _take_header(self) -> Step | None:
        if len(self._received) < wire.OPTION_HEADER.size:
            return _NEED_DATA
        magic, option, length = wire.OPTION_HEADER.unpack(self._take(wire.OPTION_HEADER.size))
        self._options += 1
        if refusal := self._refusal(magic, option, length):
            return self._move(HardDisconnect(refusal))
        self._state = self._expect(option, length)
        return None

    def _take_data(self, length: int, answer: Callable[[bytes], _Answer]) -> Step:
        if len(self._received) < length:
            return _NEED_DATA
        return self._move(answer(self._take(length)))

    def _take_waste(self, length: int, answer: Callable[[bytes], _Answer]) -> Step:
        dropped = min(length, len(self._received))
        del self._received[:dropped]
        if dropped < length:
            self._state = _Waste(length - dropped, answer)
            return _NEED_DATA
        return self._move(answer(b""))

    def _move(self, answer: _Answer) -> _Answer:
        self._state = _Header() if isinstance(answer, Reply | StartTls) else answer
        return answer

    def _take(self, length: int) -> bytes:
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    # --- options ---------------------------------------------------------------------------

    def _refusal(self, magic: int, option: int, length: int) -> str | None:
        """Why an option leaves only a hard disconnect, if it does."""
        if magic != wire.OPTION_MAGIC:
            return f"bad option magic 0x{magic:016x}"
        if self._options > limits.NBD_OPTIONS_LIMIT:
            return f"more than {limits.NBD_OPTIONS_LIMIT} options"
        if option == Option.EXPORT_NAME:  # it has no way to answer with an error
            too_long = length > limits.NBD_STRING_BYTES
            return f"export name of {length} bytes" if too_long else None
        if not self._client_flags & ClientFlag.C_FIXED_NEWSTYLE:
            return f"option {option} ({option_label(option)}) from a client without fixed newstyle"
        if length > limits.NBD_OPTION_DRAIN_BYTES:
            return f"option {option} ({option_label(option)}) with {length} bytes of data"
        return None

    def _expect(self, option: int, length: int) -> _Data | _Waste:
        """The state that gathers an option's data and then answers it."""
        takes, run = self._OPTIONS.get(option, (_Takes.ANYTHING, Handshake._unsupported))
        if self._tls is _Tls.REQUIRED and option != Option.STARTTLS:
            takes, run = _Takes.ANYTHING, Handshake._tls_required
        if option == Option.SET_META_CONTEXT:  # even where it is refused
            self._agreement.forget_contexts()
        if takes is _Takes.DATA and length <= limits.NBD_OPTION_DATA_BYTES:
            return _Data(length, partial(self._answer, run, option))
        if takes is _Takes.DATA:
            run = Handshake._too_big
        elif takes is _Takes.NOTHING and length:
            run = Handshake._unexpected_length
        elif takes is _Takes.NO_MORE:
            length = 0
        return _Waste(length, partial(self._answer, run, option))

    def _answer(self, run: _Run, option: int, data: bytes) -> _Answer:
        try:
            return run(self, option, data)
        except OptionError as error:
            if option == Option.EXPORT_NAME:  # it has no way to answer with an error
                return HardDisconnect(error.message)
            message = error.message.encode()
            return Reply(wire.option_reply(option, error.kind, message))

    def _export_name(self, option: int, data: bytes) -> _Answer:
        if self._agreement.headers is Headers.EXTENDED:
            raise OptionError(Rep.ERR_INVALID, "Extended headers already negotiated")
        export = self._find(parse_name(option, data))
        flags = self._agreement.flags(option, export)
        reply = wire.EXPORT_NAME_REPLY.pack(export.size_bytes, flags)
        if not self._client_flags & ClientFlag.C_NO_ZEROES:
            reply += bytes(wire.EXPORT_NAME_ZEROES_BYTES)
        return self._transmission(export, reply)

    def _abort(self, option: int, _data: bytes) -> _Answer:
        return SoftDisconnect(wire.option_reply(option, Rep.ACK))

    def _list(self, option: int, _data: bytes) -> _Answer:
        replies = []
        for export in self._exports.list():
            name = export.name.encode()
            data = wire.U32.pack(len(name)) + name + export.description.encode()
            replies.append(wire.option_reply(option, Rep.SERVER, data))
        replies.append(wire.option_reply(option, Rep.ACK))
        return Reply(b"".join(replies))

    def _starttls(self, option: int, _data: bytes) -> _Answer:
        match self._tls:
            case _Tls.NONE:
                raise OptionError(Rep.ERR_POLICY, "TLS not configured")
            case _Tls.ON:
                raise OptionError(Rep.ERR_INVALID, "TLS already enabled")
        self._tls = _Tls.ON
        return StartTls(wire.option_reply(option, Rep.ACK), self._take(len(self._received)))

    def _tls_required(self, option: int, _data: bytes) -> _Answer:
        error = OptionError(Rep.ERR_TLS_REQD, f"Option 0x{option:x} not permitted before TLS")
        if option == Option.ABORT:
            return SoftDisconnect(wire.option_reply(option, error.kind, error.message.encode()))
        raise error

    def _info(self, option: int, data: bytes) -> _Answer:
        """INFO and GO, which differ only in what follows."""
        name, requests = parse_info(option, data)
        export = self._find(name)
        infos = self._infos(option, export, requests)
        replies = [wire.option_reply(option, Rep.INFO, info) for info in infos]
        replies.append(wire.option_reply(option, Rep.ACK))
        reply = b"".join(replies)
        return self._transmission(export, reply) if option == Option.GO else Reply(reply)

    def _headers(self, option: int, _data: bytes) -> _Answer:
        """STRUCTURED_REPLY and EXTENDED_HEADERS."""
        self._agreement.agree_on_headers(option)
        return Reply(wire.option_reply(option, Rep.ACK))

    def _meta_context(self, option: int, data: bytes) -> _Answer:
        """LIST_META_CONTEXT and SET_META_CONTEXT."""
        lists = option == Option.LIST_META_CONTEXT
        if not lists:
            self._agreement.check_contexts_fit()
        name, queries = parse_meta(option, data)
        export = self._find(name)
        numbers = matching(export.contexts, queries, lists=lists)
        if not lists:
            self._agreement.select_contexts(export, numbers)
        # In a list the number is reserved.
        contexts = [meta_context(0 if lists else n, export.contexts[n]) for n in numbers]
        replies = [wire.option_reply(option, Rep.META_CONTEXT, each) for each in contexts]
        replies.append(wire.option_reply(option, Rep.ACK))
        return Reply(b"".join(replies))

    def _unsupported(self, option: int, _data: bytes) -> _Answer:
        raise OptionError(Rep.ERR_UNSUP, f"Unsupported option {option} ({option_label(option)})")

    def _unexpected_length(self, option: int, _data: bytes) -> _Answer:
        raise unexpected_length(option)

    def _too_big(self, option: int, _data: bytes) -> _Answer:
        taken = limits.NBD_OPTION_DATA_BYTES
        raise OptionError(
            Rep.ERR_TOO_BIG, f"option '{option_label(option)}' is longer than {taken}"
        )

    #: All options that we know. Any other is answered with ERR_UNSUP.
    _OPTIONS: ClassVar[dict[int, tuple[_Takes, _Run]]] = {
        Option.EXPORT_NAME: (_Takes.DATA, _export_name),
        Option.ABORT: (_Takes.NO_MORE, _abort),
        Option.LIST: (_Takes.NOTHING, _list),
        Option.STARTTLS: (_Takes.NOTHING, _starttls),
        Option.INFO: (_Takes.DATA, _info),
        Option.GO: (_Takes.DATA, _info),
        Option.STRUCTURED_REPLY: (_Takes.NOTHING, _headers),
        Option.LIST_META_CONTEXT: (_Takes.DATA, _meta_context),
        Option.SET_META_CONTEXT: (_Takes.DATA, _meta_context),
        Option.EXTENDED_HEADERS: (_Takes.NOTHING, _headers),
    }

    # --- what an answer is made of ---------------------------------------------------------

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            shown = wire.encode_string(name, limits.NBD_NAME_SHOWN_BYTES).decode()
            dots = "" if shown == name else "..."
            raise OptionError(Rep.ERR_UNKNOWN, f"export '{shown}{dots}' not present")
        return export

    def _transmission(self, export: ExportInfo, reply: bytes) -> Transmission:
        early = self._take(len(self._received))
        contexts = self._agreement.contexts(export)
        return Transmission(export, self._agreement.headers, contexts, reply, early)

    def _infos(self, option: int, export: ExportInfo, requests: set[int]) -> Iterable[bytes]:
        """Description and block sizes are told unasked, as QEMU does: proto.md allows it."""
        if Info.NAME in requests:
            yield wire.U16.pack(Info.NAME) + export.name.encode()
        if export.description:
            yield wire.U16.pack(Info.DESCRIPTION) + export.description.encode()
        yield wire.INFO_BLOCK_SIZE.pack(
            Info.BLOCK_SIZE,
            export.minimum_block_bytes,
            export.preferred_block_bytes,
            export.maximum_block_bytes,
        )
        yield wire.INFO_EXPORT.pack(
            Info.EXPORT, export.size_bytes, self._agreement.flags(option, export)
        )
