"""Checkpoints of one image that come upon each other."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.block import Node
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


def enable(node: Node) -> None:
    node.bitmaps.get("off").enable()
    node.write_nowait(5 * GRANULE, DATA)


def disable(node: Node) -> None:
    node.bitmaps.get("on").disable()
    node.write_nowait(5 * GRANULE, DATA)


def enable_for_a_while(node: Node) -> None:
    enable(node)
    node.bitmaps.get("off").disable()
    node.write_nowait(6 * GRANULE, DATA)


def disable_for_a_while(node: Node) -> None:
    disable(node)
    node.bitmaps.get("on").enable()
    node.write_nowait(6 * GRANULE, DATA)


@pytest.mark.parametrize("change", [enable, disable, enable_for_a_while, disable_for_a_while])
@pytest.mark.parametrize("held", range(3))
async def test_what_is_recorded_is_durable_with_the_answer(
    tmp_path: Path, change: Callable[[Node], None], held: int
) -> None:
    """Whatever a checkpoint is at when the command comes; ``held``: the commit that it is in."""
    image, at, go_on = make_image(tmp_path / "disk.img"), threading.Event(), threading.Event()
    numbers: Iterator[int] = iter(())

    def before_commit() -> None:
        if next(numbers, None) == held:
            at.set()
            go_on.wait()

    async with daemon(tmp_path / "state", image, before_commit=before_commit) as one:
        node = await one.node()
        await one.add(node, "on")
        await one.add(node, "off")
        await node.write(3 * GRANULE, DATA)
        node.bitmaps.get("off").disable()
        assert await one.state.keep(node)
        await node.write(4 * GRANULE, DATA)
        numbers = count()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.checkpoint, node)
            await trio.to_thread.run_sync(at.wait)
            change(node)
            go_on.set()
            assert await one.state.keep(node)
            killed = one.after_kill()
        async with daemon(killed, image) as two:
            found = await two.node()
            for name in ("on", "off"):
                assert dirty(found, name) == dirty(node, name)
                assert found.bitmaps.get(name).recording == node.bitmaps.get(name).recording
            assert two.heard.recovered == []
