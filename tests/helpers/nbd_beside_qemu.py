"""blockd and qemu-nbd side by side: the same random conversations, and what may differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeAlias, TypeVar

from blockd.nbd.wire import Cmd, Errno, Headers, Option, Rep
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_codec import Call
from tests.helpers.nbd_process import qemu_nbd, serving
from tests.helpers.nbd_programs import (
    DESCRIPTION,
    DISK_BYTES,
    EXPORT,
    Answer,
    haggle,
    haggling,
    program,
    run,
)
from tests.helpers.qmp_client import QmpClient


class Request(NamedTuple):
    """A request that has been answered in two ways."""

    call: Call
    headers: Headers
    ours: Answer
    theirs: Answer

    def is_of(self, *commands: Cmd) -> bool:
        return self.call.cmd in commands

    def codes(self, ours: int, theirs: int) -> bool:
        return (self.ours.code, self.theirs.code) == (ours, theirs)


class Haggled(NamedTuple):
    """An option that has been answered in two ways; what came before it, in one."""

    option: int
    data: bytes
    ours: Answer
    theirs: Answer


_Case = TypeVar("_Case")
#: Why two answers differ, and whether that is so.
_Table: TypeAlias = "dict[str, Callable[[_Case], bool]]"

#: In what our answers to requests differ from QEMU's, and are meant to.
REQUESTS: _Table[Request] = {
    "NBD wants ENOSPC where a write goes past the end": lambda request: (
        request.is_of(Cmd.WRITE, Cmd.WRITE_ZEROES) and request.codes(Errno.ENOSPC, Errno.EINVAL)
    ),
    "a flush has no range, but QEMU looks at it": lambda request: (
        request.is_of(Cmd.FLUSH)
        and request.theirs.code == Errno.EINVAL
        and request.call.offset + request.call.length > DISK_BYTES
    ),
}

#: The same of options.
OPTIONS: _Table[Haggled] = {
    "QEMU looks for names that are no UTF-8": lambda haggled: (
        haggled.ours == Answer(Rep.ERR_INVALID, message="export name is not valid UTF-8")
        and haggled.theirs.code in (Rep.ERR_UNKNOWN, Rep.ERR_INVALID)
    ),
    "QEMU looks for the export before it has read all lengths": lambda haggled: (
        haggled.option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
        and haggled.ours.code == Rep.ERR_INVALID
        and haggled.ours.message.startswith("Inconsistent lengths")
        and haggled.theirs.code == Rep.ERR_UNKNOWN
    ),
}


class Pair:
    """Sockets of both servers; ``differed`` counts the differences that were met."""

    def __init__(self, ours: str, theirs: str) -> None:
        self.ours = ours
        self._theirs = theirs
        self.differed: Counter[str] = Counter()

    def haggle(self, random: Random) -> None:
        """Play a handshake on both. Raises ``AssertionError`` for a difference not in the table."""
        asked = haggling(random)
        ours, theirs = haggle(self.ours, asked), haggle(self._theirs, asked)
        for (option, data), our, their in zip(asked.options, ours, theirs, strict=False):
            for mine, yours in zip(our, their, strict=False):
                if mine != yours:
                    haggled = Haggled(option, data, mine, yours)
                    self._allow(OPTIONS, haggled)
            assert len(our) == len(their), (asked, our, their)
        assert len(ours) == len(theirs), (asked, ours, theirs)

    def run(self, random: Random) -> None:
        """The same with requests, and what the disk then holds."""
        asked = program(random)
        ours, theirs = run(self.ours, asked), run(self._theirs, asked)
        for call, our, their in zip(asked.calls, ours.answers, theirs.answers, strict=True):
            if our != their:
                self._allow(REQUESTS, Request(call, asked.headers, our, their))
        assert ours.content == theirs.content

    def _allow(self, table: _Table[_Case], case: _Case) -> None:
        reason = next((reason for reason, applies in table.items() if applies(case)), None)
        assert reason is not None, case
        self.differed[reason] += 1


@contextmanager
def side_by_side(directory: Path, daemon: Daemon) -> Iterator[Pair]:
    """A disk of zeroes each, by ``daemon``, which runs, and by a qemu-nbd while the body runs.

    Neither flushes to the disk, which would only take time.
    """
    images = [directory / name for name in ("ours.img", "theirs.img")]
    for image in images:
        image.write_bytes(bytes(DISK_BYTES))
    ours = directory / "ours.sock"
    with QmpClient(daemon.qmp_path) as qmp:
        add_disk(qmp, images[0])
        serve_disk(qmp, str(ours))
    options = [
        "--cache=unsafe",
        "--allocation-depth",
        f"--export-name={EXPORT}",
        f"--description={DESCRIPTION}",
    ]
    log = directory / "qemu-nbd.log"
    with serving(qemu_nbd(images[1], *options), directory / "theirs.sock", log) as process:
        yield Pair(str(ours), str(process.socket_path))


def add_disk(qmp: QmpClient, image: Path) -> None:
    """A node over ``image``; nothing is flushed to the disk."""
    options = {"discard": "unmap", "cache": {"no-flush": True}}
    file = {"driver": "file", "filename": str(image)}
    qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file, **options})


def serve_disk(qmp: QmpClient, path: str) -> None:
    """Export the node at the socket ``path``, anew where it is: then nobody is connected."""
    if qmp.execute("query-block-exports"):
        qmp.execute("nbd-server-stop")
    qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
    export |= {"name": EXPORT, "description": DESCRIPTION, "allocation-depth": True}
    qmp.execute("block-export-add", export)
