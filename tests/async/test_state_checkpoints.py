"""Checkpoints of one image that come upon each other."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path

import trio
from trio.testing import wait_all_tasks_blocked

from tests.helpers.state_rig import DATA, GRANULE, daemon, dirty, make_image


async def test_a_close_stores_what_a_checkpoint_before_it_could_not(tmp_path: Path) -> None:
    """The close came while that one began, and had been about to count on it."""
    image, closing, storing = make_image(tmp_path / "disk.img"), threading.Event(), False
    numbers = count()

    def before_commit() -> None:
        number = next(numbers) if storing else None
        if number == 0:  # the epoch begins
            closing.wait()
        elif number == 1:  # the bitmap's pieces
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with daemon(tmp_path / "state", image, before_commit=before_commit) as one:
        node = await one.node()
        await one.add(node)
        await node.write(3 * GRANULE, DATA)
        storing = True

        async def store() -> None:
            with suppress(OSError):
                await one.checkpoint(node)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store)
            await wait_all_tasks_blocked()
            nursery.start_soon(one.close, node)
            await wait_all_tasks_blocked()
            closing.set()
    async with daemon(tmp_path / "state", image) as two:
        assert dirty(await two.node()) == {3}
