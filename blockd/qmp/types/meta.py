"""The session, and the daemon as a whole."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Command


class QmpCapabilities(Command, kw_only=True):
    """Begin: until then no other command is taken, and no event sent.

    ``enable``: capabilities out of those in the greeting; this daemon offers none, so it knows
    the protocol's only one, but refuses it.
    """

    command: ClassVar[str] = "qmp_capabilities"

    enable: list[Literal["oob"]] | None = None


class QueryVersion(Command, kw_only=True):
    """The version of QEMU whose protocol this is, and of this daemon (``package``)."""

    command: ClassVar[str] = "query-version"


class QueryCommands(Command, kw_only=True):
    """The names of all commands."""

    command: ClassVar[str] = "query-commands"


class Quit(Command, kw_only=True):
    """End the daemon: exports are closed, jobs cancelled, bitmaps reclaimed, data flushed."""

    command: ClassVar[str] = "quit"
