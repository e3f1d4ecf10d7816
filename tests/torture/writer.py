"""A guest in a process of its own: it writes until it is stopped, or the daemon is gone.

It takes lines from standard input, ``go SOCKET EXPORT BYTES`` and ``stop``, and answers when it
has stopped, with ``stopped`` or ``gone``.
"""

from __future__ import annotations

import io
import random
import select
import sys
import threading
from pathlib import Path

from blockd.nbd.wire import Cmd
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.torture.write_log import BLOCK_BYTES, Answer, Kind, Logged, WriteLog, stamped

#: In flight at once, at most.
DEPTH = 8
#: A guest stays in one place for a while.
ZONE_BYTES = 2 << 20
ZONE_BATCHES = 60
#: A guest does other things too: the pause between two batches.
PAUSE_SECONDS = 0.004
COMMANDS = {Kind.WRITE: Cmd.WRITE, Kind.ZERO: Cmd.WRITE_ZEROES, Kind.TRIM: Cmd.TRIM}


class Writer:
    def __init__(self, log: WriteLog, seed: int) -> None:
        self._log = log
        self._random = random.Random(seed)
        self._pause = threading.Event()

    def run(self, client: NbdClient, size_bytes: int) -> None:
        """Write until a line comes; ``EOFError`` or ``OSError`` where the daemon has gone."""
        batches = 0
        zone = 0
        while not select.select([0], [], [], 0)[0]:
            if batches % ZONE_BATCHES == 0:
                zone = self._random.randrange(0, size_bytes - ZONE_BYTES, BLOCK_BYTES)
            batches += 1
            self._batch(client, zone, size_bytes)
            self._pause.wait(PAUSE_SECONDS)

    def _batch(self, client: NbdClient, zone: int, size_bytes: int) -> None:
        sent = []
        for _ in range(self._random.randint(1, DEPTH)):
            write = self._next(zone, size_bytes)
            number = self._log.append(write)
            sent.append((number, client.submit(self._call(number, write))))
        for number, cookie in sent:
            try:
                client.wait(cookie)
            except NbdError:
                self._log.answer(number, Answer.ERROR)
            else:
                self._log.answer(number, Answer.DONE)

    def _next(self, zone: int, size_bytes: int) -> Logged:
        draw = self._random
        blocks = draw.choice((1, 1, 1, 2, 4, 16)) if draw.random() < 0.98 else 256
        length = blocks * BLOCK_BYTES
        if draw.random() < 0.9:
            offset = zone + draw.randrange(0, ZONE_BYTES - length + 1, BLOCK_BYTES)
        else:
            offset = draw.randrange(0, size_bytes - length, BLOCK_BYTES)
        kind = draw.choices((Kind.WRITE, Kind.ZERO, Kind.TRIM), (17, 2, 1))[0]
        return Logged(offset, length, kind)

    def _call(self, number: int, write: Logged) -> Call:
        if write.kind is not Kind.WRITE:
            return Call(COMMANDS[write.kind], write.offset, write.length)
        data = b"".join(stamped(number, block) for block in write.blocks())
        return Call(Cmd.WRITE, write.offset, data=data)


def main() -> None:
    directory, name, seed = sys.argv[1:]
    writer = Writer(WriteLog(Path(directory), name), int(seed))
    # Unbuffered, so that a line which has come is seen by ``select``.
    lines = io.FileIO(0)
    for line in iter(lines.readline, b""):
        words = line.decode().split()
        if words[0] == "stop":
            continue
        try:
            with NbdClient.open(words[1], words[2]) as client:
                writer.run(client, int(words[3]))
        except (EOFError, OSError):
            sys.stdout.write("gone\n")
        else:
            sys.stdout.write("stopped\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
