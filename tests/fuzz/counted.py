"""blockd, counting its tasks: ``python -m tests.fuzz.counted DIRECTORY OPTION…`` in its place.

It works in the directory; the number of living tasks stands in the file ``tasks`` there. Host
names are not looked up: what is made at random must not go out to the network.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from typing import Any
from unittest.mock import patch

import trio

from blockd.__main__ import main


class TaskCount(trio.abc.Instrument):
    """Writes the count each time it changes."""

    def __init__(self) -> None:
        self._count = 0
        self._file = os.open("tasks", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _change(self, by: int) -> None:
        self._count += by
        os.pwrite(self._file, b"%9d" % self._count, 0)

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._change(1)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._change(-1)


_getaddrinfo = socket.getaddrinfo


def getaddrinfo(
    host: Any,
    port: Any,
    family: int = 0,
    type: int = 0,  # noqa: A002 - the name that it has
    proto: int = 0,
    flags: int = 0,
) -> Any:
    return _getaddrinfo(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)


if __name__ == "__main__":
    os.chdir(sys.argv.pop(1))
    counting = functools.partial(trio.run, instruments=[TaskCount()])
    with patch.multiple(trio, run=counting), patch.multiple(socket, getaddrinfo=getaddrinfo):
        sys.exit(main())
