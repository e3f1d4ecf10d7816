"""Images that others write to behind our back, and clocks that are set: what the times tell."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import Node
from blockd.state.host import Boot
from blockd.state.records import Identity
from tests.helpers.state_rig import (
    BOOT,
    DATA,
    GRANULE,
    REGION,
    SIZE,
    Daemon,
    daemon,
    dirty,
    open_node,
)
from tests.helpers.state_rig import make_image as make_file

SECOND = 10**9
HOUR = 3600 * SECOND
ALL = set(range(SIZE // GRANULE))
CHANGED = [("b", "image-changed")]


@dataclass
class Host:
    """A clock that can be set, and what it gave the image for times."""

    path: Path
    image: Path
    now: int = 10**18
    changed: int = 10**18
    inode_changed: int = 10**18
    _copies: Iterator[int] = field(default_factory=itertools.count)

    def identify(self, fd: int) -> Identity:
        return Identity(1, 1, "", SIZE, self.changed, self.inode_changed)

    def clock(self) -> int:
        return self.now

    def change(self) -> None:
        self.changed = self.inode_changed = self.now

    async def write(self, node: Node, granule: int) -> None:
        await node.write(granule * GRANULE, DATA)
        self.change()

    def boot(self) -> Boot:
        """The machine is started again."""
        self.now += 30 * SECOND
        return Boot("next", self.now)

    @asynccontextmanager
    async def daemon(self, path: Path | None = None, boot: Boot = BOOT) -> AsyncIterator[Daemon]:
        async with daemon(path or self.path, self.image, boot=boot, clock=self.clock) as one:
            yield one

    async def killed(self, *, idle: int = 0) -> Path:
        """A daemon that had a kept bitmap, with granule 1 dirty, and was killed at this instant.

        For ``idle`` nanoseconds before that nothing was written.
        """
        async with self.daemon() as first:
            node = await first.node()
            await first.add(node)
            await self.write(node, 1)
            await first.tick()
            self.now += idle
            await first.tick()
            return first.after_kill()

    async def recovered(self, path: Path, boot: Boot = BOOT) -> set[int]:
        """What is dirty for the next daemon; all of it is only with a reason."""
        copy = path.with_name(f"{path.name}-{next(self._copies)}")
        shutil.copytree(path, copy)
        async with self.daemon(copy, boot) as second:
            found = dirty(await second.node())
            assert second.heard.recovered == (CHANGED if found == ALL else [])
            return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path / "state", make_file(tmp_path / "disk.img"))
    for module in ("directory", "places", "epochs", "watch"):
        monkeypatch.setattr(f"blockd.state.{module}.identify", host.identify)
    return host


async def test_a_change_between_a_kill_and_a_reboot_is_found_out(host: Host) -> None:
    killed = await host.killed()
    host.now += (limits.STATE_HEARTBEAT_CUT_SECONDS + 1) * SECOND
    host.change()
    assert await host.recovered(killed, host.boot()) == ALL


async def test_what_we_wrote_before_a_power_cut_is_ours(host: Host) -> None:
    """The note of when we were alive is only as new as it was made durable."""
    killed = await host.killed()
    host.now += (limits.STATE_HEARTBEAT_CUT_SECONDS - 1) * SECOND
    host.change()
    assert await host.recovered(killed, host.boot()) == set(range(REGION // GRANULE))


async def test_a_daemon_that_had_long_nothing_to_keep_is_alive_at_a_power_cut(host: Host) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await first.close(node)
        host.now += HOUR
        node = await first.node()
        host.now += HOUR
        await host.write(node, 1)
        cut = first.after_kill()
    assert await host.recovered(cut, host.boot()) == set(range(REGION // GRANULE))


async def test_a_daemon_in_between_knows_no_less_of_the_one_before_the_reboot(host: Host) -> None:
    killed = await host.killed()
    boot = host.boot()
    async with host.daemon(killed, boot) as second:
        host.now += HOUR
        await second.node(make_file(host.image.with_name("other.img")), name="other")
        killed = second.after_kill()
    host.change()
    assert await host.recovered(killed, boot) == ALL


@pytest.mark.parametrize("reboot", [False, True])
async def test_an_old_copy_of_the_state_directory_is_found_out(host: Host, *, reboot: bool) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await host.write(node, 1)
        copies = [first.after_kill()]
        await first.close(node)
        copies.append(first.after_kill())
        node = await first.node()
        host.now += HOUR
        await host.write(node, 9)
        node.bitmaps.get("b").clear()
        await first.close(node)
    boot = host.boot() if reboot else BOOT
    for copy in copies:
        assert await host.recovered(copy, boot) == ALL


@pytest.mark.parametrize("step", [-HOUR, HOUR])
async def test_a_change_after_a_kill_and_after_the_clock_was_set_is_found_out(
    host: Host, step: int
) -> None:
    killed = await host.killed(idle=2 * HOUR)
    host.now += step
    host.change()
    assert await host.recovered(killed) == ALL


async def test_a_clock_that_was_ahead_for_a_while_hides_no_change(host: Host) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        host.now += HOUR
        await first.tick()
        await host.write(node, 1)
        killed = first.after_kill()
    host.now -= HOUR - SECOND
    host.change()
    assert await host.recovered(killed) == ALL


@pytest.mark.parametrize("step", [-HOUR, HOUR])
@pytest.mark.parametrize("busy", [False, True])
async def test_a_clock_that_is_set_makes_nothing_dirty(
    host: Host, step: int, *, busy: bool
) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await host.write(node, 1)
        host.now += step
        await first.tick()
        if busy:
            host.now += SECOND
            await host.write(node, 1)
        killed = first.after_kill()
        assert await host.recovered(killed) == {1}
        await first.close(node)
        closed = first.after_kill()
    host.now -= step
    for boot in (BOOT, host.boot()):
        assert await host.recovered(closed, boot) == {1}


async def test_an_older_state_of_the_images_file_system_is_found_out(host: Host) -> None:
    """Such as by a snapshot of its volume: times, too, are what they were."""
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        older = host.changed
        host.now += HOUR
        await host.write(node, 1)
        await first.close(node)
        closed = first.after_kill()
        node = await first.node()
        await host.write(node, 9)
        killed = first.after_kill()
    host.changed = host.inode_changed = older
    boot = host.boot()
    for path in (closed, killed):
        assert await host.recovered(path, BOOT) == ALL
        assert await host.recovered(path, boot) == ALL


async def test_a_time_that_somebody_gave_the_image_before_is_as_good_as_any(host: Host) -> None:
    host.changed += 1000 * HOUR
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await first.close(node)
        node = await first.node()
        await node.write(0, DATA)
        host.inode_changed = host.now
        assert await host.recovered(first.after_kill()) == {0}


async def attach(host: Host, one: Daemon, *, read_only: bool) -> Node:
    node = open_node(host.image)
    node.read_only = read_only
    await one.state.attach(node)
    return node


@pytest.mark.parametrize("after_kill", [False, True])
async def test_what_others_write_to_a_node_that_is_read_only_is_not_taken_for_ours(
    host: Host, *, after_kill: bool
) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await host.write(node, 1)
        path = first.after_kill()
        if not after_kill:
            await first.close(node)
            path = first.after_kill()
    async with host.daemon(path) as second:
        node = await attach(host, second, read_only=True)
        assert dirty(node) == {1}
        host.now += 10 * SECOND
        host.change()
        await second.tick()
        killed = second.after_kill()
        await second.close(node)
        closed = second.after_kill()
        node = await attach(host, second, read_only=True)
        assert dirty(node) == ALL
    for path in (killed, closed):
        assert await host.recovered(path) == ALL


async def test_a_node_that_becomes_read_only_is_as_good_as_closed(host: Host) -> None:
    async with host.daemon() as first:
        node = await first.node()
        await first.add(node)
        await host.write(node, 1)
        node.read_only = True
        await first.state.settle(node)
        settled = first.after_kill()
        # Nothing is owed.
        assert await first.state.keep(node)
        host.now += SECOND
        assert await host.recovered(settled) == {1}
        assert await host.recovered(settled, host.boot()) == {1}
        node.read_only = False
        await host.write(node, 2)
        assert dirty(node) == {1, 2}
        assert await host.recovered(first.after_kill()) == {1, 2}
        node.read_only = True
        await first.state.settle(node)
        host.now += SECOND
        host.change()
        await first.state.settle(node)
        node.read_only = False
        # The first write finds it out, before it is done.
        await host.write(node, 3)
        assert first.heard.recovered == CHANGED
        assert dirty(node) == ALL
        assert await host.recovered(first.after_kill()) == ALL


async def test_a_guests_write_while_the_bitmaps_are_still_being_stored_is_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node was read-only for less time than that takes."""
    monkeypatch.setattr(limits, "STATE_KEEP_SECONDS", 0)
    async with host.daemon() as first:
        node = await first.node()
        bitmap = node.bitmaps.add("b", GRANULE)
        bitmap.persistent = True
        await first.state.keep(node)
        await host.write(node, 1)
        node.read_only = True
        await first.state.settle(node)
        node.read_only = False
        for granule in range(2, 40):
            await host.write(node, granule * 7)
            killed = first.after_kill()
            wanted = {1, *(each * 7 for each in range(2, granule + 1))}
            assert wanted <= await host.recovered(killed)
