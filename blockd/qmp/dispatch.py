"""From a command's name to its handler, and from what that raises to QMP's error classes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from blockd.errors import (
    BlockdError,
    CommandNotFoundError,
    DeviceNotActiveError,
)
from blockd.qmp import arguments
from blockd.qmp.services import Services
from blockd.qmp.types import base as declarations

_log = logging.getLogger(__name__)

#: A handler gets the services and the checked arguments, and gives plain data (None: ``{}``).
Handler = Callable[[Services, Any], Any] | Callable[[Services, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Command:
    """A plain handler is one step, with nothing in between. An async one keeps other changing
    commands out, unless it is ``concurrent``: it may wait for long, and guards itself.
    """

    name: str
    declaration: Any
    handler: Handler
    concurrent: bool = False

    @classmethod
    def of(
        cls, declaration: type[declarations.Command], handler: Handler, *, concurrent: bool = False
    ) -> Command:
        """The command that ``declaration`` names."""
        return cls(declaration.command, declaration, handler, concurrent)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client gets it; ``bug``: one that should not have been."""

    error_class: str
    message: str
    bug: bool = False


#: The class of each kind of refusal; that of any other failure is the first.
ERROR_CLASSES: dict[type[BlockdError], str] = {
    BlockdError: "GenericError",
    CommandNotFoundError: "CommandNotFound",
    DeviceNotActiveError: "DeviceNotActive",
}


def classify(error: Exception) -> Failure:
    """What a client is told of an error."""
    if isinstance(error, BlockdError):
        return Failure(ERROR_CLASSES.get(type(error), "GenericError"), error.message)
    if isinstance(error, OSError) and error.errno is not None:
        return Failure("GenericError", os.strerror(error.errno))
    return Failure("GenericError", f"Internal error: {error!r}; see the daemon's log", bug=True)


def describe(error: Exception) -> Failure:
    """As ``classify``; an error that should not have been is logged."""
    failure = classify(error)
    if failure.bug:
        _log.error("a command failed unexpectedly", exc_info=error)
    return failure


class Dispatcher:
    """The commands there are."""

    def __init__(self, commands: list[Command], services: Services) -> None:
        self._commands = {command.name: command for command in commands}
        self._services = services

    def changing(self, name: str) -> Command | None:
        """The command of this name, if there is one and it may change something."""
        command = self._commands.get(name)
        if command is None or getattr(command.declaration, "read_only", False):
            return None
        return command

    async def execute(self, name: str, sent: dict[str, Any]) -> Any:
        """Carry out a command; whatever it raises is for ``describe``."""
        command = self._commands.get(name)
        if command is None:
            raise CommandNotFoundError(f"The command {name} has not been found")
        checked = arguments.parse(command.declaration, sent)
        if command.concurrent:
            return await command.handler(self._services, checked)
        self._check_not_ending()
        if not inspect.iscoroutinefunction(command.handler):
            return command.handler(self._services, checked)
        async with self._services.changes:
            self._check_not_ending()
            return await command.handler(self._services, checked)

    def _check_not_ending(self) -> None:
        if self._services.ending:
            raise BlockdError("blockd is ending and takes no more commands")
