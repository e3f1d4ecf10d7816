"""From a command's name to its handler, and from errors to what a client is told."""

from __future__ import annotations

import errno
import logging
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, cast

import pytest
import trio

from blockd.errors import (
    BlockdError,
    CommandNotFoundError,
    DeviceNotActiveError,
)
from blockd.qmp import types
from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Command, Dispatcher, Failure, describe
from blockd.qmp.services import Services
from blockd.qmp.session import NEGOTIATION
from blockd.qmp.types import base


class Say(base.Command, kw_only=True):
    """A command for the tests."""

    command: ClassVar[str] = "x-say"

    text: str
    times: base.Int64 = 1


class FewServices:
    """What the dispatcher itself needs of the services."""

    def __init__(self) -> None:
        self.changes = trio.Lock()
        self.ending = False


def dispatcher(*commands: Command) -> tuple[Dispatcher, FewServices]:
    services = FewServices()
    return Dispatcher(list(commands), cast("Services", services)), services


# -- commands ----------------------------------------------------------------------------------


async def test_a_handler_gets_the_services_and_the_checked_arguments() -> None:
    seen: list[object] = []

    def say(services: Services, arguments: Say) -> str:
        seen.append(services)
        return arguments.text * arguments.times

    dispatch, services = dispatcher(Command.of(Say, say))
    assert await dispatch.execute("x-say", {"text": "ab"}) == "ab"
    assert await dispatch.execute("x-say", {"text": "ab", "times": 2}) == "abab"
    assert seen == [services, services]


async def test_an_async_handler_is_awaited() -> None:
    async def say(_services: Services, arguments: Say) -> str:
        await trio.lowlevel.checkpoint()
        return arguments.text

    dispatch, _ = dispatcher(Command.of(Say, say))
    assert await dispatch.execute("x-say", {"text": "a"}) == "a"


async def test_an_unknown_command() -> None:
    dispatch, _ = dispatcher()
    with pytest.raises(CommandNotFoundError) as refused:
        await dispatch.execute("x-say", {})
    assert refused.value.message == "The command x-say has not been found"


async def test_bad_arguments_never_reach_the_handler() -> None:
    dispatch, _ = dispatcher(Command.of(Say, lambda _services, _arguments: pytest.fail("called")))
    with pytest.raises(BlockdError, match="Parameter 'text' is missing"):
        await dispatch.execute("x-say", {"times": 1})


# -- who keeps whom out --------------------------------------------------------------------------


class Turns:
    """A handler that begins, waits for leave, and ends; all of that is written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.leave = trio.Event()

    async def waiting(self, _services: Services, arguments: Say) -> None:
        self.log.append(f"{arguments.text} begins")
        await self.leave.wait()
        self.log.append(f"{arguments.text} ends")

    def at_once(self, _services: Services, arguments: Say) -> None:
        self.log.append(arguments.text)


async def run_two(first: Command, second: Command, turns: Turns) -> list[str]:
    dispatch, _ = dispatcher(first, second)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dispatch.execute, first.name, {"text": "first"})
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dispatch.execute, second.name, {"text": "second"})
        await trio.testing.wait_all_tasks_blocked()
        turns.leave.set()
    return turns.log


async def test_one_changing_command_at_a_time() -> None:
    turns = Turns()
    first = Command("x-one", Say, turns.waiting)
    second = Command("x-two", Say, turns.waiting)
    assert await run_two(first, second, turns) == [
        "first begins",
        "first ends",
        "second begins",
        "second ends",
    ]


async def test_a_command_of_one_step_need_not_wait() -> None:
    turns = Turns()
    first = Command("x-one", Say, turns.waiting)
    second = Command("x-two", Say, turns.at_once)
    assert await run_two(first, second, turns) == ["first begins", "second", "first ends"]


@pytest.mark.parametrize("concurrent_first", [True, False])
async def test_a_concurrent_command_neither_waits_nor_keeps_others_out(
    *, concurrent_first: bool
) -> None:
    turns = Turns()
    first = Command("x-one", Say, turns.waiting, concurrent=concurrent_first)
    second = Command("x-two", Say, turns.waiting, concurrent=not concurrent_first)
    log = await run_two(first, second, turns)
    assert log[:2] == ["first begins", "second begins"]


async def test_a_command_that_fails_lets_the_next_one_in() -> None:
    async def fail(_services: Services, _arguments: Say) -> None:
        raise OSError(errno.EIO, "")

    dispatch, services = dispatcher(Command.of(Say, fail))
    with pytest.raises(OSError, match="Errno 5"):
        await dispatch.execute("x-say", {"text": ""})
    assert not services.changes.locked()


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (BlockdError("No"), Failure("GenericError", "No")),
        (CommandNotFoundError("No"), Failure("CommandNotFound", "No")),
        (DeviceNotActiveError("No"), Failure("DeviceNotActive", "No")),
        (OSError(errno.ENOSPC, "whatever"), Failure("GenericError", "No space left on device")),
        (FileNotFoundError(errno.ENOENT, ""), Failure("GenericError", "No such file or directory")),
    ],
)
def test_what_was_to_be_reckoned_with_is_told_and_not_logged(
    error: Exception, failure: Failure, caplog: pytest.LogCaptureFixture
) -> None:
    assert describe(error) == failure
    assert caplog.records == []


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("no number"), ExceptionGroup("g", [BlockdError("x")])]
)
def test_what_was_not_is_logged_with_its_trace(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    failure = describe(error)
    assert failure.error_class == "GenericError"
    assert failure.message.startswith("Internal error: ")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error


# -- the table -----------------------------------------------------------------------------------


def test_every_declaration_has_its_command() -> None:
    modules = [
        import_module(module.name) for module in iter_modules(types.__path__, f"{types.__name__}.")
    ]
    declared = {
        each.command
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, base.Command)
        # The common part of several commands has no name.
        if vars(each).get("command")
    }
    unions = {"blockdev-add", "block-export-add", "block-job-change", "object-add"}
    assert declared | unions == {NEGOTIATION, *(command.name for command in COMMANDS)}


def test_handlers_take_what_is_declared() -> None:
    for command in COMMANDS:
        annotations: dict[str, Any] = command.handler.__annotations__
        assert len(annotations) == 3, command.name
