"""Transactions: one instant for all nodes, and nothing left of a refused one, or of a dry run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.bitmap import Reason
from blockd.block import Node, RawDriver, Role
from blockd.errors import BlockdError
from tests.helpers.command_rig import CommandRig, action, command_rig
from tests.helpers.memory_driver import MemoryDriver

KIB = 1024
OLD = b"o" * (64 * KIB)
ABORT = action("abort")
ABORTED = "Transaction aborted using Abort action"
IN_USE = "Bitmap 'b' is currently in use by another operation and cannot be used"


def on_bitmap(command: str, node: str = "n", name: str = "b", **data: Any) -> dict[str, Any]:
    return action(f"block-dirty-bitmap-{command}", node=node, name=name, **data)


def merge(*sources: Any, node: str = "n", target: str = "b") -> dict[str, Any]:
    return action("block-dirty-bitmap-merge", node=node, target=target, bitmaps=[*sources])


def backup(job: str = "j", device: str = "n", target: str = "t", **data: Any) -> dict[str, Any]:
    defaults = {"job_id": job, "device": device, "target": target, "sync": "full"}
    return action("blockdev-backup", **{**defaults, **data})


def drive_backup(target: Path, job: str = "j", **data: Any) -> dict[str, Any]:
    defaults = {"job_id": job, "device": "n", "target": str(target), "sync": "full"}
    return action("drive-backup", **{**defaults, "format": "raw", **data})


@asynccontextmanager
async def two_disks() -> AsyncIterator[CommandRig]:
    """Disks ``n`` and ``m``, each with a bitmap ``b`` by 512 bytes, and targets ``t`` and ``u``."""
    drivers = {name: MemoryDriver(OLD) for name in "nmtu"}
    async with command_rig(**drivers) as rig:
        for node in "nm":
            await rig.execute("block-dirty-bitmap-add", node=node, name="b", granularity=512)
            await rig.write(node, 0, 512)
        yield rig


async def refused(rig: CommandRig, *actions: dict[str, Any], grouped: bool = False) -> str:
    """The error of a transaction, of which nothing is left."""
    before = rig.state()
    with pytest.raises(BlockdError) as error:
        await rig.transact(*actions, grouped=grouped)
    assert rig.state() == before
    return error.value.message


# --- one instant ---------------------------------------------------------------------------------


async def test_it_waits_for_the_writes_in_flight_of_all_disks() -> None:
    async with two_disks() as rig, trio.open_nursery() as guests:
        with rig.drivers["n"].hold("write") as hold:
            guests.start_soon(rig.write, "n", 8 * KIB, 512)
            await hold.reached.wait()
            guests.start_soon(rig.transact, on_bitmap("clear"), on_bitmap("clear", "m"))
            await wait_all_tasks_blocked()
            # One that comes now is after the instant, which is not there yet for any disk.
            guests.start_soon(rig.write, "n", 16 * KIB, 512)
            await wait_all_tasks_blocked()
            assert rig.drivers["n"].counts["write"] == 2
            assert [rig.nodes[node].bitmaps.get("b").count_bytes for node in "nm"] == [1024, 512]
    assert [rig.nodes[node].bitmaps.get("b").count_bytes for node in "nm"] == [512, 0]
    assert rig.nodes["n"].bitmaps.get("b").usable_bits().intersects(16 * KIB, 512)


class Hesitant(RawDriver):
    """Passes a write on when it is told to."""

    def __init__(self, child: Node) -> None:
        super().__init__(child)
        self.go = trio.Event()

    async def write(self, offset: int, view: memoryview) -> None:
        await self.go.wait()
        await super().write(offset, view)


async def test_a_disk_and_the_one_it_stands_on() -> None:
    """A write in flight to the upper one still has to reach the lower one."""
    async with command_rig(lower=MemoryDriver(OLD)) as rig, trio.open_nursery() as guests:
        rig.drivers["lower"].filename = "/lower.img"
        upper = Hesitant(rig.nodes["lower"])
        rig.nodes["upper"] = rig.graph.add("upper", upper, owned=True)
        guests.start_soon(rig.write, "upper", 0, 512)
        await wait_all_tasks_blocked()
        guests.start_soon(rig.transact, on_bitmap("add", "lower"), on_bitmap("add", "upper"))
        await wait_all_tasks_blocked()
        upper.go.set()
    assert [node.bitmaps.get("b").count_bytes for node in rig.nodes.values()] == [0, 0]
    assert rig.drivers["lower"].data[:512] == b"w" * 512


async def test_a_disk_whose_writes_wait_for_the_target_of_its_backup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target is quiesced behind the disk, though its name comes first."""
    monkeypatch.setattr(limits, "BACKUP_CLUSTER_BYTES", 4 * KIB)
    monkeypatch.setattr(limits, "HELD_BYTES_LIMIT", 4 * KIB)
    async with (
        command_rig(z=MemoryDriver(OLD), a=MemoryDriver(OLD)) as rig,
        trio.open_nursery() as guests,
    ):
        await rig.transact(backup("j", "z", "a", sync="none"))
        with rig.drivers["a"].hold("write") as hold:
            for offset in range(0, 32 * KIB, 4 * KIB):
                guests.start_soon(rig.write, "z", offset, 512)
            await hold.reached.wait()
            guests.start_soon(rig.transact, on_bitmap("add", "a"), on_bitmap("add", "z"))
            await wait_all_tasks_blocked()
        while not rig.nodes["z"].bitmaps.list():
            await trio.lowlevel.checkpoint()
        await rig.jobs.get("j").cancel()
    assert rig.statuses()[-4:] == ["j running", "j aborting", "j concluded", "j null"]


async def test_an_undone_clear_leaves_the_reason_there() -> None:
    async with two_disks() as rig:
        bitmap = rig.nodes["n"].bitmaps.get("b")
        bitmap.reason = Reason.IMAGE_CHANGED
        await refused(rig, on_bitmap("clear"), ABORT)
        assert bitmap.reason is Reason.IMAGE_CHANGED


# --- all or none ---------------------------------------------------------------------------------

UNDONE: dict[str, list[dict[str, Any]]] = {
    "add": [on_bitmap("add", name="x")],
    "remove": [on_bitmap("remove")],
    "clear": [on_bitmap("clear")],
    "disable": [on_bitmap("disable")],
    "merge": [merge({"node": "m", "name": "b"})],
    "clear and merge": [on_bitmap("clear"), merge({"node": "m", "name": "b"})],
    "full, always": [backup(bitmap="b", bitmap_mode="always")],
    "bitmap, always": [backup(sync="bitmap", bitmap="b", bitmap_mode="always")],
    "incremental": [backup(sync="incremental", bitmap="b")],
    "two backups of one disk": [backup(), backup("k", target="u", sync="none")],
    "everything": [
        on_bitmap("add", name="x"),
        merge("b", target="x"),
        on_bitmap("clear"),
        on_bitmap("disable", "m"),
        backup(sync="bitmap", bitmap="x", bitmap_mode="always"),
        on_bitmap("remove", "m"),
    ],
}


@pytest.mark.parametrize("actions", UNDONE.values(), ids=UNDONE)
async def test_nothing_is_left_of_a_refused_one(actions: list[dict[str, Any]]) -> None:
    async with two_disks() as rig:
        assert await refused(rig, *actions, ABORT) == ABORTED
        assert await rig.rehearse(*actions, ABORT) == [None] * len(actions) + [ABORTED]
        digest = rig.nodes["n"].bitmaps.get("b").copy_bits().digest()
        await rig.write("n", 0, 512)
        assert rig.nodes["n"].bitmaps.get("b").copy_bits().digest() == digest
        await rig.write("n", 8 * KIB, 512)
        assert rig.nodes["n"].bitmaps.get("b").count_bytes == 1024
        # What was undone may be done.
        await rig.transact(*actions)


async def test_a_bug_in_an_action_undoes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_disks() as rig:
        before = rig.state()
        monkeypatch.setattr("blockd.bitmap.NodeBitmaps.add", None)
        with pytest.raises(TypeError):
            await rig.transact(on_bitmap("clear"), backup(), on_bitmap("add", name="x"))
        assert rig.state() == before


async def test_a_client_that_gives_up_while_it_waits() -> None:
    async with two_disks() as rig, trio.open_nursery() as guests:
        with rig.drivers["n"].hold("write") as hold:
            guests.start_soon(rig.write, "n", 8 * KIB, 512)
            await hold.reached.wait()
            before = rig.state()
            with trio.move_on_after(0):
                await rig.transact(on_bitmap("clear", "m"), backup())
            assert rig.state() == before
    assert rig.events == []


async def test_no_target_is_left_of_a_refused_one(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"precious")
    async with two_disks() as rig:
        for actions in (
            [drive_backup(tmp_path / "new"), drive_backup(there, "k", device="m"), ABORT],
            [on_bitmap("clear", name="zz"), drive_backup(tmp_path / "new")],
            [drive_backup(tmp_path / "new"), drive_backup(tmp_path / "new", "k", device="m")],
            [drive_backup(tmp_path / "new"), drive_backup(tmp_path / "no" / "dir", "k")],
            [drive_backup(tmp_path / "new", speed=-1)],
        ):
            await refused(rig, *actions)
            assert there.read_bytes() == b"precious"
            assert os.listdir(tmp_path) == ["there"]


async def test_the_first_error_counts_though_a_later_one_was_known_before(tmp_path: Path) -> None:
    async with two_disks() as rig:
        missing = drive_backup(tmp_path / "no" / "dir")
        assert await refused(rig, on_bitmap("clear", name="zz"), missing) == (
            "Dirty bitmap 'zz' not found"
        )
        assert (await refused(rig, missing)).startswith("Could not create")
        unknown = drive_backup(tmp_path / "no" / "dir", device="zz")
        assert await refused(rig, unknown) == "Cannot find device='zz' nor node-name='zz'"


# --- a dry run -----------------------------------------------------------------------------------


async def test_a_dry_run_tells_every_error() -> None:
    async with two_disks() as rig:
        before = rig.state()
        assert await rig.rehearse(
            on_bitmap("add", name="x"),
            on_bitmap("clear", name="zz"),
            backup(sync="incremental", bitmap="b"),
            on_bitmap("remove"),
            backup("j", "m", "u"),
            backup("k", "m", "t"),
            backup("k", "m", "u", speed=-1),
            ABORT,
            on_bitmap("disable", name="x"),
        ) == [
            None,
            "Dirty bitmap 'zz' not found",
            None,
            IN_USE,
            "Job ID 'j' already in use",
            "Node 't' is busy: block device is in use by block job: backup",
            "Parameter 'speed' expects a non-negative value",
            ABORTED,
            None,
        ]
        assert rig.state() == before
        assert rig.events == []


async def test_a_dry_run_holds_to_the_groups_rules() -> None:
    async with two_disks() as rig:
        assert await rig.rehearse(on_bitmap("clear"), backup(), grouped=True) == [None, None]
        with pytest.raises(BlockdError, match="'abort' does not support transaction property"):
            await rig.rehearse(ABORT, grouped=True)


async def test_a_dry_run_touches_no_target(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"precious")
    os.utime(there, (1, 1))
    os.utime(tmp_path, (1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.utime(tmp_path, (1, 1))
    async with two_disks() as rig:
        before = rig.state()
        assert await rig.rehearse(
            drive_backup(tmp_path / "new"),
            drive_backup(there, "k", device="m"),
            drive_backup(tmp_path / "no" / "dir", "l"),
            drive_backup(there / "below", "m"),
            drive_backup(tmp_path, "o"),
            drive_backup(tmp_path / "link", "p"),
            drive_backup(tmp_path / "new", "q", mode="existing"),
        ) == [
            None,
            None,
            f"Could not create '{tmp_path}/no/dir': No such file or directory",
            f"Could not create '{there}/below': Not a directory",
            f"Could not create '{tmp_path}': Is a directory",
            None,
            f"Could not open '{tmp_path}/new': No such file or directory",
        ]
        assert rig.state() == before
    assert there.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert there.stat().st_mtime == tmp_path.stat().st_mtime == 1


async def test_a_dry_run_of_a_target_in_a_directory_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    async with two_disks() as rig:
        new = tmp_path / "new"
        assert await rig.rehearse(drive_backup(new)) == [
            f"Could not create '{new}': Permission denied"
        ]


# --- jobs ----------------------------------------------------------------------------------------


async def test_jobs_begin_at_one_instant() -> None:
    """What guests write after it is in no backup, of whichever disk."""
    async with two_disks() as rig:
        await rig.transact(backup(), backup("k", "m", "u"), grouped=True)
        for node in "nm":
            await rig.write(node, 32 * KIB, 512)
        await rig.jobs.get("j").wait_concluded()
        assert rig.drivers["t"].data == rig.drivers["u"].data == b"w" * 512 + OLD[512:]


@pytest.mark.parametrize("grouped", [True, False])
async def test_one_that_fails(*, grouped: bool) -> None:
    """Grouped, the other's bitmap does not move on either, though its copy was complete."""
    async with two_disks() as rig:
        rig.drivers["u"].fail("flush", 1)
        incremental = {"sync": "incremental", "bitmap": "b"}
        await rig.transact(
            backup(**incremental), backup("k", "m", "u", **incremental), grouped=grouped
        )
        for job in rig.jobs.newest_first():
            await job.wait_concluded()
        counts = [rig.nodes[node].bitmaps.get("b").count_bytes for node in "nm"]
        assert counts == [512 if grouped else 0, 512]
        assert not any(bitmap.busy for node in "nm" for bitmap in rig.nodes[node].bitmaps.list())


async def test_bitmaps_of_a_group_change_with_it() -> None:
    async with two_disks() as rig:
        await rig.transact(
            on_bitmap("add", name="next"), on_bitmap("clear", "m"), backup(), grouped=True
        )
        assert rig.nodes["n"].bitmaps.get("next").recording
        assert rig.nodes["m"].bitmaps.get("b").count_bytes == 0


async def test_results_count_at_one_instant() -> None:
    """With a write in flight to the one disk, neither bitmap forgets."""
    async with two_disks() as rig, trio.open_nursery() as guests:
        incremental: dict[str, Any] = {"sync": "incremental", "bitmap": "b", "auto_finalize": False}
        await rig.transact(
            backup(**incremental), backup("k", "m", "u", **incremental), grouped=True
        )
        while "k pending" not in rig.statuses():
            await trio.lowlevel.checkpoint()
        with rig.drivers["n"].hold("write") as hold:
            guests.start_soon(rig.write, "n", 8 * KIB, 512)
            await hold.reached.wait()
            guests.start_soon(rig.jobs.get("j").finalize)
            await wait_all_tasks_blocked()
            assert [rig.nodes[node].bitmaps.get("b").busy for node in "nm"] == [True, True]
    assert [rig.nodes[node].bitmaps.get("b").busy for node in "nm"] == [False, False]
    assert [rig.nodes[node].bitmaps.get("b").count_bytes for node in "nm"] == [512, 0]
    assert not rig.nodes["t"].users.of(Role.TARGET)
