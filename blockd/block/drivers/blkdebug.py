"""``blkdebug``: errors on demand, for tests of what is above it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import trio

from blockd.block.allocation import Allocation
from blockd.block.drivers.file import SECTOR_BYTES
from blockd.block.drivers.filter import Filter
from blockd.block.node import Node
from blockd.errors import WouldBlock

#: What an error without an ``iotype`` strikes.
_DEFAULT_IO_TYPES = frozenset({"read", "write", "write-zeroes", "discard", "flush"})


@dataclass(frozen=True, slots=True, eq=False)
class InjectError:
    """From ``event`` on, while the state was ``state`` (0: any), requests fail with ``errno``.

    ``sector``: only those that touch it. ``once``: only the first. ``immediately``: without
    letting others run before.
    """

    event: str
    state: int = 0
    io_type: str | None = None
    errno: int = errno.EIO
    sector: int | None = None
    once: bool = False
    immediately: bool = False

    def strikes(self, io_type: str, offset: int, length: int) -> bool:
        """Whether a request fails by this."""
        if io_type not in (_DEFAULT_IO_TYPES if self.io_type is None else {self.io_type}):
            return False
        return self.sector is None or offset <= self.sector * SECTOR_BYTES < offset + length


@dataclass(frozen=True, slots=True, eq=False)
class SetState:
    """``event`` takes the driver from ``state`` (0: any) to ``new_state``."""

    event: str
    new_state: int
    state: int = 0


class BlkdebugDriver(Filter):
    """A small automaton: events of the drivers around it move its state and arm its errors."""

    name = "blkdebug"
    child_option = "image"
    # Every request is looked at, so none goes by a shorter path.
    passes_descriptors = False

    def __init__(
        self,
        child: Node,
        *,
        read_only: bool = False,
        errors: Sequence[InjectError] = (),
        transitions: Sequence[SetState] = (),
    ) -> None:
        self._errors = list(errors)
        self._transitions = transitions
        super().__init__(child, read_only=read_only)
        self._state = 1
        self._armed: list[InjectError] = []
        self.debug_event("none")

    def own_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"driver": self.name}
        for number, rule in enumerate(self._errors):
            options |= _told(f"inject-error.{number}", rule)
        for number, transition in enumerate(self._transitions):
            options |= _told(f"set-state.{number}", transition)
        return options

    def child_changed(self) -> None:
        super().child_changed()
        # They are looked at here, whatever becomes of them below.
        self.ignores_discards = False

    def describe(self) -> str:
        below = self.child.driver
        if len(self.own_options()) == 1 and "filename" in below.options:
            return f"{self.name}::{below.filename}"
        return super().describe()

    def debug_event(self, event: str) -> None:
        """Arm what belongs to ``event``, in place of what was armed before, and change state."""
        due = [rule for rule in self._errors if self._is_due(rule, event)]
        if due:
            self._armed = due
        for rule in self._transitions:
            if self._is_due(rule, event):
                self._state = rule.new_state
                return

    def _is_due(self, rule: InjectError | SetState, event: str) -> bool:
        return rule.event == event and rule.state in (0, self._state)

    async def _check(self, io_type: str, offset: int, length: int) -> None:
        """Raise the error that strikes this request, if one does."""
        for rule in self._armed:
            if rule.strikes(io_type, offset, length):
                break
        else:
            return
        if rule.once:
            self._armed.remove(rule)
            self._errors.remove(rule)
        if not rule.immediately:
            await trio.lowlevel.checkpoint()
        if rule.errno:
            raise OSError(rule.errno, os.strerror(rule.errno))

    def read_nowait(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    def write_nowait(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    async def read(self, offset: int, view: memoryview) -> None:
        await self._check("read", offset, len(view))
        await super().read(offset, view)

    async def write(self, offset: int, view: memoryview) -> None:
        self.debug_event("pwritev")
        await self._check("write", offset, len(view))
        await super().write(offset, view)
        self.debug_event("pwritev_done")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.debug_event("pwritev_zero")
        await self._check("write-zeroes", offset, length)
        await super().write_zeroes(offset, length, unmap=unmap)
        self.debug_event("pwritev_done")

    async def discard(self, offset: int, length: int) -> None:
        await self._check("discard", offset, length)
        await super().discard(offset, length)

    async def flush(self) -> None:
        self.debug_event("flush_to_os")
        self.debug_event("flush_to_disk")
        await self._check("flush", 0, 0)
        await super().flush()

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        await self._check("block-status", offset, length)
        return await super().allocation(offset, length)


def _told(prefix: str, rule: InjectError | SetState) -> dict[str, Any]:
    """What of a rule differs from the default, with the names of the options."""
    names = {"io_type": "iotype"}
    return {
        f"{prefix}.{names.get(each.name, each.name)}": value
        for each in fields(rule)
        if (value := getattr(rule, each.name)) != each.default
    }
