"""The data that come with options: their grammar, and how they are refused.

Source: ``doc/proto.md``, "Conventions" and "Option types". Where QEMU has a message, it is used.
"""

from __future__ import annotations

from blockd import limits
from blockd.nbd import wire
from blockd.nbd.wire import Option, Rep


class OptionError(Exception):
    """An option can't be granted; the client is told why."""

    def __init__(self, kind: Rep, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def parse_info(option: int, data: bytes) -> tuple[str, set[int]]:
    """The export's name and the information requests in the data of INFO or GO.

    Raises:
        OptionError: the lengths don't fit together, or the name is none.
    """
    message = f"Inconsistent lengths in option {option_label(option)}"
    inconsistent = OptionError(Rep.ERR_INVALID, message)
    name_at, fixed = wire.U32.size, wire.U32.size + wire.U16.size
    if len(data) < fixed:
        raise inconsistent
    (name_length,) = wire.U32.unpack_from(data)
    if name_length > limits.NBD_STRING_BYTES:
        raise OptionError(Rep.ERR_INVALID, f"Invalid name length: {name_length}")
    if name_length > len(data) - fixed:
        raise inconsistent
    name = parse_name(option, data[name_at : name_at + name_length])
    (count,) = wire.U16.unpack_from(data, name_at + name_length)
    requests = data[fixed + name_length :]
    if len(requests) < count * wire.U16.size:
        raise inconsistent
    if len(requests) > count * wire.U16.size:
        raise unexpected_length(option)
    return name, {request for (request,) in wire.U16.iter_unpack(requests)}


def parse_name(option: int, data: bytes) -> str:
    """An export's name: UTF-8 without NUL.

    Raises:
        OptionError: it is not.
    """
    if b"\0" in data:
        raise OptionError(
            Rep.ERR_INVALID, f"Unexpected embedded NUL in option {option_label(option)}"
        )
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(Rep.ERR_INVALID, "export name is not valid UTF-8") from None


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
