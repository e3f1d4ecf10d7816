"""A state directory that does not answer while a command waits for it: then the reply goes out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blockd import limits
from blockd.bitmap import Bits
from blockd.block import Node
from tests.helpers.hung_commits import HungCommits
from tests.helpers.simulated_disk import SimulatedDisk
from tests.helpers.state_rig import DATA, GRANULE, SIZE, daemon, dirty, make_image

ALL = set(range(SIZE // GRANULE))


def enable(node: Node) -> None:
    node.bitmaps.get("off").enable()


def merge(node: Node) -> None:
    node.bitmaps.get("off").merge_from([node.bitmaps.get("on").usable_bits()])


def put_back(node: Node) -> None:
    bits = Bits(SIZE, GRANULE)
    bits.mark(9 * GRANULE, 1)
    node.bitmaps.get("on").put_back(bits)


def enable_and_disable(node: Node) -> None:
    enable(node)
    node.write_nowait(3 * GRANULE, DATA)
    node.bitmaps.get("off").disable()


def abdicate_with_more(node: Node) -> None:
    bits = Bits(SIZE, GRANULE)
    bits.mark(9 * GRANULE, 1)
    node.bitmaps.get("on").freeze("job").abdicate(bits)


@pytest.mark.parametrize(
    "change", [enable, merge, put_back, enable_and_disable, abdicate_with_more]
)
async def test_what_would_be_lost_leaves_all_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Node], None]
) -> None:
    image, commits = make_image(tmp_path / "disk.img"), HungCommits()
    async with daemon(tmp_path / "state", image, before_commit=commits.before) as one:
        node = await one.node()
        await one.add(node, "on")
        await one.add(node, "off")
        node.bitmaps.get("off").disable()
        await node.write(3 * GRANULE, DATA)
        assert await one.state.keep(node)
        with commits.hung(monkeypatch):
            change(node)
            assert not await one.state.keep(node)
            assert one.heard.failed == ["it does not answer"]
            # Guests are not held up, although nothing can be armed.
            await node.write(SIZE - GRANULE, DATA)
            killed = one.after_kill()
        async with daemon(killed, image) as two:
            found = await two.node()
            assert {name: dirty(found, name) for name in ("on", "off")} == {"on": ALL, "off": ALL}
            assert {reason for _, reason in two.heard.recovered} == {"state-damaged"}
        # When it answers again, all is as if it had not hung.
        now = {name: dirty(node, name) for name in ("on", "off")}
        assert await one.state.keep(node)
        assert one.heard.resumed == 1
        async with daemon(one.after_kill(), image) as two:
            found = await two.node()
            assert {name: dirty(found, name) for name in ("on", "off")} == now
            assert two.heard.recovered == []


def clear(node: Node) -> None:
    node.bitmaps.get("on").clear()


def disable(node: Node) -> None:
    node.bitmaps.get("on").disable()


def abdicate(node: Node) -> None:
    node.bitmaps.get("on").freeze("job").abdicate()


def remove(node: Node) -> None:
    node.bitmaps.remove("on")


@pytest.mark.parametrize("change", [clear, disable, abdicate, remove])
async def test_what_errs_to_dirty_is_left_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Node], None]
) -> None:
    image, commits = make_image(tmp_path / "disk.img"), HungCommits()
    async with daemon(tmp_path / "state", image, before_commit=commits.before) as one:
        node = await one.node()
        await one.add(node, "on")
        await node.write(3 * GRANULE, DATA)
        with commits.hung(monkeypatch):
            change(node)
            assert not await one.state.keep(node)
            assert one.heard.failed == []
            killed = one.after_kill()
        async with daemon(killed, image) as two:
            assert dirty(await two.node(), "on") == {3}
            assert two.heard.recovered == []


async def test_a_clean_close_after_it_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, commits = make_image(tmp_path / "disk.img"), HungCommits()
    async with daemon(tmp_path / "state", image, before_commit=commits.before) as one:
        node = await one.node()
        await one.add(node, "on")
        with commits.hung(monkeypatch):
            put_back(node)
            assert not await one.state.keep(node)
        await one.close(node)
        again = await one.node()
        assert dirty(again, "on") == {9}
        assert one.heard.recovered == []
        assert one.heard.resumed == 1


async def test_what_hangs_is_begun_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    """It is tried again each second where it fails."""
    image, disk = make_image(tmp_path / "disk.img"), SimulatedDisk()
    at, go, fails, calls = threading.Event(), threading.Event(), False, count()

    def before(call: str) -> None:
        if call == "open":
            next(calls)
            at.set()
            go.wait()

    def before_commit() -> None:
        if fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with daemon(tmp_path / "state", image, disk=disk, before_commit=before_commit) as one:
        node = await one.node()
        await one.add(node, "on")
        disk.before, fails = before, True
        put_back(node)
        monkeypatch.setattr(limits, "STATE_KEEP_SECONDS", 0)
        monkeypatch.setattr(limits, "STATE_POISON_SECONDS", 0)
        assert not await one.state.keep(node)
        await trio.to_thread.run_sync(at.wait)
        for _ in range(5):
            mock_clock.jump(limits.STATE_HEARTBEAT_SECONDS)
            await wait_all_tasks_blocked()
        go.set()
        await one.at_rest()
        # The command's, and one of all the seconds'.
        assert next(calls) <= 2
