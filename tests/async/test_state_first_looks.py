"""What the state directory records of images that are opened, and when it was last alive."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.block import Node, RawDriver
from blockd.state.disk import HostDisk
from blockd.state.heartbeat import Heartbeat
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.state_rig import (
    DATA,
    GRANULE,
    SIZE,
    Daemon,
    daemon,
    dirty,
    make_image,
    open_node,
)

_NS = 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.raw")


def last_alive(path: Path, seconds_from_now: int) -> None:
    Heartbeat(HostDisk(str(path / "marks"))).note(time.time_ns() + seconds_from_now * _NS)


async def killed_after_a_write(path: Path, image: Path) -> Path:
    async with daemon(path, image) as first:
        node = await first.node()
        await first.add(node)
        await node.write(GRANULE, DATA)
        return first.after_kill()


async def killed_after_a_change(second: Daemon, file: Node) -> Path:
    """The image changes in ten seconds; in twenty it is let go of, and the daemon is gone."""
    later = time.time_ns() + 10 * _NS
    os.utime(second.image, ns=(later, later))
    await file.driver.close()
    path = second.after_kill()
    last_alive(path, 20)
    return path


async def test_what_is_looked_at_and_not_attached_is_watched_as_before(
    path: Path, image: Path
) -> None:
    """Such as for another node over the same file, or where opening fails."""
    path = await killed_after_a_write(path, image)
    async with daemon(path, image) as second:
        file = open_node(image)
        await second.state.look_at(file)
        await second.state.opening_ended()
        await file.write(2 * GRANULE, DATA)
        path = second.after_kill()
        await file.driver.close()
        assert len(dirty(await second.node())) == SIZE // GRANULE
    async with daemon(path, image) as third:
        assert len(dirty(await third.node())) == SIZE // GRANULE
        assert third.heard.recovered == [("b", "image-changed")]


async def test_what_is_attached_in_the_end_is_ours(path: Path, image: Path) -> None:
    path = await killed_after_a_write(path, image)
    async with daemon(path, image) as second:
        file = open_node(image)
        await second.state.look_at(file)
        await second.node()
        await second.state.opening_ended()
        path = await killed_after_a_change(second, file)
    async with daemon(path, image) as third:
        assert dirty(await third.node()) == {1}
        assert third.heard.recovered == []


async def test_who_looks_at_a_file_read_only_does_not_have_it(path: Path, image: Path) -> None:
    path = await killed_after_a_write(path, image)
    async with daemon(path, image) as second:
        file = open_node(image)
        file.read_only = True
        await second.state.look_at(file)
        path = await killed_after_a_change(second, file)
    async with daemon(path, image) as third:
        assert len(dirty(await third.node())) == SIZE // GRANULE


async def test_a_daemon_that_had_nothing_to_keep_is_alive_when_it_has(
    path: Path, image: Path
) -> None:
    async with daemon(path, image) as first:
        node = await first.node()
        last_alive(path, -3600)
        await first.add(node)
        await node.write(GRANULE, DATA)
        path = first.after_kill()
    async with daemon(path, image) as second:
        assert dirty(await second.node()) == {1}
        assert second.heard.recovered == []


async def test_a_directory_that_was_full_at_the_start_is_as_good_as_any_later(
    path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STATE_HEARTBEAT_SECONDS", 0.001)
    full, tried_again = True, threading.Event()

    def before_commit() -> None:
        if full:
            raise OSError(28, "No space left on device")
        tried_again.set()

    async with daemon(path, image, before_commit=before_commit) as first:
        full = False
        assert await trio.to_thread.run_sync(tried_again.wait, PATIENCE_SECONDS)
        node = await first.node()
        await first.add(node)
        await node.write(GRANULE, DATA)
        path = first.after_kill()
    async with daemon(path, image) as second:
        assert dirty(await second.node()) == {1}
        assert second.heard.recovered == []


async def test_a_look_counts_for_its_own_opening_only(path: Path, image: Path) -> None:
    async with daemon(path, image) as first:
        file = open_node(image)
        below = Node("below", RawDriver(file, read_only=False))
        top = Node("top", RawDriver(below, read_only=False))
        await first.state.attach(top)
        await first.add(top)
        await top.write(GRANULE, DATA)
        async with first.state.closing(top):
            pass
        # Such as of a node that is refused, since another one has the file.
        await first.state.look_at(file)
        await first.state.opening_ended()
        os.utime(image, ns=(0, 0))
        top = Node("top", RawDriver(below, read_only=False))
        await first.state.look_at(below)
        await first.state.attach(top)
        assert first.heard.recovered == [("b", "image-changed")]
