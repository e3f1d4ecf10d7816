"""What client and server have agreed on in the course of a handshake.

Source: ``doc/proto.md``, "Transmission flags", "Option types"; its branch
``extension-ext-header`` for extended headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blockd.nbd.options import OptionError, option_label
from blockd.nbd.wire import Headers, Option, Rep, TransmissionFlag


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told about an export.

    ``name`` and ``description`` are at most ``limits.NBD_STRING_BYTES`` long; the description is
    empty where there is none. ``flags`` say what the export can do; those that depend on the form
    of replies are added for each client. The block sizes obey proto.md's "Size constraints".
    ``contexts``: the names of its meta contexts, by number.
    """

    name: str
    description: str
    size_bytes: int
    flags: TransmissionFlag
    minimum_block_bytes: int
    preferred_block_bytes: int
    maximum_block_bytes: int
    contexts: Mapping[int, str] = field(default_factory=dict)


class Agreement:
    """Nothing at first. Where TLS is required, nothing can be agreed on before it."""

    def __init__(self) -> None:
        self.headers = Headers.SIMPLE
        #: The export for which contexts were selected last, and these by number.
        self._selected_of = ""
        self._selected: dict[int, str] = {}

    def agree_on_headers(self, option: int) -> None:
        """STRUCTURED_REPLY or EXTENDED_HEADERS. Raises ``OptionError``: not any more."""
        wanted = Headers.EXTENDED if option == Option.EXTENDED_HEADERS else Headers.STRUCTURED
        if wanted is self.headers:
            raise OptionError(Rep.ERR_INVALID, f"{option_label(option)} already negotiated")
        if self.headers is Headers.EXTENDED:
            raise OptionError(Rep.ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        self.headers = wanted

    def check_contexts_fit(self) -> None:
        """Raise ``OptionError`` where no reply could tell of a context."""
        if self.headers is Headers.SIMPLE:
            label = option_label(Option.SET_META_CONTEXT)
            raise OptionError(
                Rep.ERR_INVALID,
                f"request option '{label}' when structured reply is not negotiated",
            )

    def forget_contexts(self) -> None:
        """Each SET_META_CONTEXT takes the place of the one before, even if it is refused."""
        self._selected = {}

    def select_contexts(self, export: ExportInfo, numbers: Iterable[int]) -> None:
        self._selected_of = export.name
        self._selected = {number: export.contexts[number] for number in numbers}

    def contexts(self, export: ExportInfo) -> tuple[int, ...]:
        """The numbers of those that were selected of this export, and are still what they were."""
        if self._selected_of != export.name:
            return ()
        offered = export.contexts
        return tuple(n for n, name in self._selected.items() if offered.get(n) == name)

    def flags(self, option: int, export: ExportInfo) -> TransmissionFlag:
        """What MUST be set in an answer to ``option``, and MUST NOT be set without what it needs.

        BLOCK_STATUS_PAYLOAD is of use only to who has selected a context, or still may.
        """
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        if self.headers is not Headers.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self.headers is Headers.EXTENDED and (option == Option.INFO or self.contexts(export)):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags
