"""How images are while we have them, noted again and again, for whoever comes after a kill."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress

import trio

from blockd import limits
from blockd.state.epochs import hold_place
from blockd.state.heartbeat import Heartbeat
from blockd.state.kept_image import KeptImage
from blockd.state.places import identify
from blockd.state.records import Sighting


class Watch:
    """Looks at files, by their descriptors; devices have no times of use."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._one = trio.Lock()
        self._synced = -float("inf")

    async def look(self, images: Collection[KeptImage]) -> None:
        """Look once, and now and then make what is noted durable.

        Nothing is done where the last look still lasts. Then some changes of others after a kill
        would be taken for ours: those with times since that look began.
        """
        if self._one.locked():
            return
        async with self._one:
            if held := _held(images):
                # The descriptors are closed there.
                with trio.CancelScope(shield=True):
                    seen = await trio.to_thread.run_sync(self._look, held)
                for row, sighting in seen:
                    self._heartbeat.saw(row, sighting)
            if trio.current_time() >= self._synced + limits.STATE_HEARTBEAT_SYNC_SECONDS:
                self._synced = trio.current_time()
                with suppress(OSError):
                    await trio.to_thread.run_sync(self._heartbeat.sync)

    def _look(self, held: Sequence[tuple[int, int]]) -> Sequence[tuple[int, Sighting]]:
        seen = []
        for row, fd in held:
            with suppress(OSError):
                seen_ns = self._heartbeat.clock()
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    seen.append((row, Sighting.of(identify(fd), seen_ns)))
            os.close(fd)
        return seen

    async def end(self) -> None:
        """Return when nothing is under way any more, nor will be."""
        await self._one.acquire()


def _held(images: Collection[KeptImage]) -> Sequence[tuple[int, int]]:
    """The rows of those that may be written to, each with a descriptor."""
    held = []
    for image in images:
        if image.record.open:
            with suppress(OSError):
                held.append((image.record.row, hold_place(image.node)[1]))
    return held
