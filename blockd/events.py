"""Events from the domain to whoever listens: the monitors and the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, in QMP's terms. ``time_ns`` is wall-clock time since the epoch."""

    name: str
    data: dict[str, Any]
    time_ns: int = field(default_factory=time.time_ns)


class Bus:
    """Hands each event to every listener, in the order of subscription.

    Publishing is a plain function: an event is in every listener's queue before anything else
    can happen, so all clients see one order. A listener must neither wait nor raise.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` with each event from now on; the result ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def publish(self, name: str, data: dict[str, Any]) -> None:
        event = Event(name, data)
        for listener in tuple(self._listeners):
            listener(event)
