"""The data that come with options: their grammar, and how they are refused.

Source: ``doc/proto.md``, "Conventions" and "Option types". Where QEMU has a message, it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.wire import Option, ProtocolError, Rep

#: The names of meta contexts; a bitmap's name follows the last.
BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
#: Queries that list all contexts whose name begins like this, but select none.
_WILDCARDS: Final = ("base:", "qemu:", DIRTY_BITMAP)


class OptionError(Exception):
    """An option can't be granted; the client is told why."""

    def __init__(self, kind: Rep, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class MetaQueries(NamedTuple):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT.

    A query that is no name of ours, whatever it is, is given as an empty one.
    """

    export: str
    queries: list[str]


class _Data:
    """An option's data, taken field by field. Raises ``OptionError`` where they are too short."""

    def __init__(self, option: int, data: bytes) -> None:
        self._option = option
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self._at + count
        if end > len(self._data):
            raise OptionError(
                Rep.ERR_INVALID, f"Inconsistent lengths in option {option_label(self._option)}"
            )
        self._at, start = end, self._at
        return self._data[start:end]

    def number(self) -> int:
        """The next 32 bits."""
        return int.from_bytes(self.take(wire.U32.size))

    def text(self) -> bytes:
        """The next string, which begins with its length."""
        length = self.number()
        if length > limits.NBD_STRING_BYTES:
            raise OptionError(Rep.ERR_INVALID, f"Invalid name length: {length}")
        return self.take(length)

    def end(self) -> None:
        """Nothing may follow."""
        if self._at < len(self._data):
            raise unexpected_length(self._option)


def info_data(name: str, requests: Iterable[int]) -> bytes:
    """The data of INFO and GO."""
    listed = [wire.U16.pack(request) for request in requests]
    return _text(name) + wire.U16.pack(len(listed)) + b"".join(listed)


def parse_info(option: int, data: bytes) -> tuple[str, set[int]]:
    """The export's name and the information requests in the data of INFO or GO.

    Raises:
        OptionError: the lengths don't fit together, or the name is none.
    """
    fields = _Data(option, data)
    name = parse_name(option, fields.text())
    (count,) = wire.U16.unpack(fields.take(wire.U16.size))
    requests = fields.take(count * wire.U16.size)
    fields.end()
    return name, {request for (request,) in wire.U16.iter_unpack(requests)}


def meta_data(export: str, queries: Iterable[str]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    listed = [_text(query) for query in queries]
    return _text(export) + wire.U32.pack(len(listed)) + b"".join(listed)


def parse_meta(option: int, data: bytes) -> MetaQueries:
    """What ``meta_data`` has made.

    Raises:
        OptionError: the lengths don't fit together, the name is none, or there is a NUL.
    """
    fields = _Data(option, data)
    export = parse_name(option, fields.text())
    queries = [_query(option, fields) for _ in range(fields.number())]
    fields.end()
    return MetaQueries(export, queries)


def _query(option: int, fields: _Data) -> str:
    query = fields.take(fields.number())
    if len(query) > limits.NBD_STRING_BYTES:
        return ""
    _refuse_nul(option, query)
    try:
        return query.decode()
    except UnicodeDecodeError:
        return ""


def matching(offered: Mapping[int, str], queries: Sequence[str], *, lists: bool) -> list[int]:
    """The numbers of the contexts that are asked for, in the order in which they are offered.

    ``lists``: for LIST_META_CONTEXT, which has wildcards and takes no query for all.
    """
    if lists and not queries:
        return list(offered)
    wanted = set(queries)
    prefixes = tuple(wanted.intersection(_WILDCARDS)) if lists else ()
    return [
        number for number, name in offered.items() if name in wanted or name.startswith(prefixes)
    ]


def meta_context(number: int, name: str) -> bytes:
    """The data of a META_CONTEXT reply."""
    return wire.U32.pack(number) + name.encode()


def parse_meta_context(data: bytes) -> tuple[int, str]:
    """Its number and its name. Raises ``ProtocolError``."""
    if len(data) <= wire.U32.size:
        raise ProtocolError(f"a meta context in {len(data)} bytes")
    (number,) = wire.U32.unpack_from(data)
    return number, data[wire.U32.size :].decode(errors="replace")


def _text(string: str) -> bytes:
    data = string.encode()
    return wire.U32.pack(len(data)) + data


def parse_name(option: int, data: bytes) -> str:
    """An export's name: UTF-8 without NUL.

    Raises:
        OptionError: it is not.
    """
    _refuse_nul(option, data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(Rep.ERR_INVALID, "export name is not valid UTF-8") from None


def _refuse_nul(option: int, data: bytes) -> None:
    if b"\0" in data:
        message = f"Unexpected embedded NUL in option {option_label(option)}"
        raise OptionError(Rep.ERR_INVALID, message)


def unexpected_length(option: int) -> OptionError:
    """The refusal of an option with more data than it takes."""
    message = f"option '{option_label(option)}' has unexpected length"
    return OptionError(Rep.ERR_INVALID, message)


def option_label(option: int) -> str:
    """An option's name as QEMU writes it."""
    try:
        return Option(option).name.lower().replace("_", " ")
    except ValueError:
        return "<unknown>"
