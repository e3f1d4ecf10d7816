"""What files were before something was opened over them, which may write to them.

A qcow2 image is repaired, and marked as in use, before its node is attached. So it is recorded
beforehand that we have it. What is not attached in the end is given back: who writes to it from
then on, we too, by another way, leaves no marks, and has to be found out by the file's times.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

import msgspec
import trio

from blockd.state import changes, marks
from blockd.state.environment import Environment
from blockd.state.host import Boot
from blockd.state.records import Identity, ImageRecord, Sighting
from blockd.state.recovery import left, untouched

_log = logging.getLogger(__name__)


class FirstLooks:
    """Of one state directory, whose images ``images`` are, by row.

    ``commit`` makes a change durable, and tells whether it is; it never raises ``OSError``.
    """

    def __init__(
        self,
        environment: Environment,
        images: dict[int, ImageRecord],
        boot: Boot,
        commit: Callable[[changes.Apply], Awaitable[bool]],
    ) -> None:
        self._environment = environment
        self._images = images
        self._boot = boot
        self._commit = commit
        self._found: dict[str, Identity] = {}
        #: Rows of images that are recorded as ours while they are being opened.
        self._taken: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any image is recorded as ours that has no node yet."""
        return bool(self._taken)

    def found(self, path: str) -> Identity | None:
        """What was at the path, told once."""
        return self._found.pop(path, None)

    async def look(
        self, path: str, identity: Identity, *, attached: Collection[int], writable: bool
    ) -> None:
        """``identity``: of what is there now; ``attached``: rows of images whose node is there."""
        self._found[path] = identity
        if not writable:
            return
        for image in tuple(self._images.values()):
            ours = image.open and image.row not in attached
            if ours and image.key.endswith(f":{path}") and untouched(image, identity, self._boot):
                await self._take(image, identity)

    async def _take(self, image: ImageRecord, identity: Identity) -> None:
        heartbeat = self._environment.heartbeat
        seen = Sighting.of(identity, heartbeat.clock())
        taken = msgspec.structs.replace(
            image, identity=identity, boot_id=self._boot.boot_id, left_ns=None, seen=None
        )
        heartbeat.saw(image.row, seen)
        self._taken.add(image.row)
        if await self._commit(changes.put_image(taken)):
            self._images[image.row] = left(taken, self._boot, heartbeat.clock(), seen)

    async def end(self, *, attached: Collection[int]) -> None:
        """An opening has ended: give back the images that have not got a node.

        Those of another opening too, which costs nothing unless the daemon dies before its end:
        then its repair may be taken for a change of others.
        """
        # What is there by the next opening is not what was there now.
        self._found.clear()
        taken, self._taken = self._taken, set()
        for row in taken.difference(attached):
            if (image := self._images.get(row)) is not None:
                self._images[row] = image = _as_it_was(image)
                if not await self._commit(changes.put_image(image)):
                    await self._poison(image)

    async def _poison(self, image: ImageRecord) -> None:
        name = marks.marks_name(image.row, image.epoch)
        try:
            await trio.to_thread.run_sync(marks.poison, self._environment.disk, name)
        except OSError as error:
            _log.critical(
                "'%s': that it is left alone can't be recorded: %s. If it is written to before "
                "blockd has its bitmaps again, do a full backup",
                image.key,
                error,
            )


def _as_it_was(image: ImageRecord) -> ImageRecord:
    """The record of an image that has been left since it was looked at: any change is another's.

    No time is allowed for our own ones, as after a kill: whoever has the file open may be at once.
    """
    times_ns = image.identity.changed_ns, image.identity.inode_changed_ns
    return msgspec.structs.replace(image, left_ns=max(times_ns))
