"""The session, and the daemon as a whole."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from blockd.qmp.types.base import Command, Object, Query
from blockd.qmp.types.introspection import SchemaEntity


class QmpCapabilities(Command, kw_only=True):
    """Begin: until then no other command is taken, and no event sent.

    ``enable``: capabilities out of those in the greeting; this daemon offers none, so it knows
    the protocol's only one, but refuses it.
    """

    command: ClassVar[str] = "qmp_capabilities"

    enable: list[Literal["oob"]] | None = None


class VersionTriple(Object, kw_only=True):
    """A version's numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(Object, kw_only=True):
    """``qemu``: whose protocol this is. ``package``: ``blockd`` and its own version."""

    qemu: VersionTriple
    package: str


class QueryVersion(Query, kw_only=True):
    """The version of QEMU whose protocol this is, and of this daemon (``package``)."""

    command: ClassVar[str] = "query-version"
    returns: ClassVar[Any] = VersionInfo


class CommandInfo(Object, kw_only=True):
    """A command that there is."""

    name: str


class QueryCommands(Query, kw_only=True):
    """The names of all commands."""

    command: ClassVar[str] = "query-commands"
    returns: ClassVar[Any] = list[CommandInfo]


class QueryQmpSchema(Query, kw_only=True):
    """Every command and event with its types, in QEMU's form.

    A member that has ``default`` may be left out. An object with ``tag`` has the members of the
    variant that this member names, too. What types are called may change; what they hold counts.
    """

    command: ClassVar[str] = "query-qmp-schema"
    returns: ClassVar[Any] = list[SchemaEntity]


class Quit(Command, kw_only=True):
    """End the daemon: exports are closed, jobs cancelled, bitmaps reclaimed, data flushed."""

    command: ClassVar[str] = "quit"
