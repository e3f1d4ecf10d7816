"""A guest that knows what it wrote: the witness for what a backup must hold.

Each writer holds its lock from sending a write until the server has answered and the write is in
the writer's log. Whoever holds all the locks knows, from the logs alone, what the disk is.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.helpers.nbd_client import NbdClient

KIB = 1024

WRITERS = 3
#: The guest writes to every 8th stripe; the writers share these among them, so that the order of
#: two writes to one place is always the order of one writer's log.
STRIPE_BYTES = 256 * KIB
STRIPES_FOR_ONE_USED = 8
#: So that there is a stripe for each writer.
SMALLEST_DISK_BYTES = WRITERS * STRIPES_FOR_ONE_USED * STRIPE_BYTES
BLOCK_BYTES = 4 * KIB
#: A guest does other things too: the pause between two writes of one writer.
PAUSE_SECONDS = 0.004


class GuestFailed(Exception):  # noqa: N818 - what happened to it
    """A write failed that the server should have taken."""


class Write(NamedTuple):
    """One write, small enough to log: its data comes from the seed. Offset and length in bytes."""

    offset: int
    length: int
    seed: int

    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.length)


class Instant(NamedTuple):
    """A place in the logs: how many of each writer's writes were on the disk."""

    writes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.writes)


#: Before the first write.
BEGINNING = Instant((0,) * WRITERS)


class LoggedGuest:
    """Some writers, each a thread with its own connection, lock and log. They write until end()."""

    def __init__(self, nbd_path: Path, export: str, disk_bytes: int) -> None:
        self.changed = threading.Condition()
        assert disk_bytes >= SMALLEST_DISK_BYTES
        used = range(0, disk_bytes - STRIPE_BYTES + 1, STRIPE_BYTES * STRIPES_FOR_ONE_USED)
        self._writers = [
            _Writer(
                self.changed, NbdClient.open(str(nbd_path), export), used[number::WRITERS], number
            )
            for number in range(WRITERS)
        ]
        for writer in self._writers:
            writer.start()

    @contextlib.contextmanager
    def between_writes(self) -> Iterator[Instant]:
        """No write is under way inside the block: what the logs hold now is what the disk is."""
        with contextlib.ExitStack() as locks:
            for writer in self._writers:
                locks.enter_context(writer.lock)
            yield self.now()

    def now(self) -> Instant:
        return Instant(tuple(len(writer.log) for writer in self._writers))

    def wait_for_writes(self, count: int) -> None:
        """Return when so many more writes are done. Raises GuestFailed if one fails."""
        wanted = self.now().total + count
        with self.changed:
            self.changed.wait_for(
                lambda: self.now().total >= wanted or any(w.failure for w in self._writers)
            )
        self._check()

    def written(self, start: Instant, end: Instant) -> Iterator[Write]:
        for writer, first, last in zip(self._writers, start.writes, end.writes, strict=True):
            yield from writer.log[first:last]

    def unanswered(self) -> list[Write]:
        """After the guest has failed: writes of which it can't know whether they are done."""
        return [writer.sent for writer in self._writers if writer.sent is not None]

    def end(self) -> None:
        """Stop writing, and disconnect. Raises GuestFailed if a write has failed."""
        for writer in self._writers:
            writer.end()
        self._check()

    def _check(self) -> None:
        for writer in self._writers:
            if writer.failure is not None:
                raise GuestFailed(repr(writer.failure)) from writer.failure


class _Writer(threading.Thread):
    """Writes at random places in its stripes, again and again."""

    def __init__(
        self, changed: threading.Condition, client: NbdClient, stripes: Sequence[int], seed: int
    ) -> None:
        super().__init__(daemon=True)
        self._changed = changed
        self._client = client
        self._stripes = stripes
        self._random = random.Random(seed)
        self._ending = threading.Event()
        self.lock = threading.Lock()
        self.log: list[Write] = []
        #: The write that is under way.
        self.sent: Write | None = None
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._ending.wait(PAUSE_SECONDS):
                self._write(self._next_write())
        except Exception as failure:  # noqa: BLE001 - raised again in the guest's owner
            self.failure = failure
        with self._changed:
            self._changed.notify_all()

    def _write(self, write: Write) -> None:
        data = write.data()
        with self.lock:
            self.sent = write
            self._client.write(write.offset, data)
            self.log.append(write)
            self.sent = None
        with self._changed:
            self._changed.notify_all()

    def _next_write(self) -> Write:
        length = self._random.randrange(BLOCK_BYTES, 5 * BLOCK_BYTES, BLOCK_BYTES)
        inside = self._random.randrange(0, STRIPE_BYTES - length, BLOCK_BYTES)
        return Write(
            offset=self._random.choice(self._stripes) + inside,
            length=length,
            seed=self._random.getrandbits(64),
        )

    def end(self) -> None:
        self._ending.set()
        self.join()
        self._client.close()
