"""Promise 2: after SIGKILL at any instant no bitmap is lost, and every change is dirty.

The instants here are those after a reply, where nothing may be dirty besides: what was answered is
durable. All other instants are for ``tests/torture``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import MIB, KeptDisk


@pytest.fixture(params=["raw", "qcow2"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path, driver=request.param)
    disk.start()
    disk.add_bitmap()
    yield disk
    disk.end()


def killed(disk: KeptDisk) -> None:
    disk.kill()
    disk.start()
    assert not any("reason" in info for info in disk.infos().values())


def test_exact_bits_outlive_any_number_of_kills(disk: KeptDisk) -> None:
    granules: list[int] = []
    for granule in (3, 700, 41, 1023, 0):
        granules.append(granule)
        disk.write([granule])
        killed(disk)
        disk.check_dirty(granules)


def test_a_disk_that_was_only_opened_keeps_its_bits(disk: KeptDisk) -> None:
    disk.write([3])
    disk.quit()
    disk.start()
    for _ in range(2):
        killed(disk)
        disk.check_dirty([3])


def test_a_late_repair_is_no_change_of_others(disk: KeptDisk) -> None:
    """After a kill blockd itself writes to a qcow2 image first: it opens it, and repairs it."""
    disk.write([3, 700])
    disk.kill()
    disk.was_killed_long_ago()
    disk.start()
    disk.check_dirty([3, 700])
    killed(disk)
    disk.check_dirty([3, 700])


def merge(disk: KeptDisk) -> list[int]:
    disk.add_bitmap("merged")
    disk.write([8])
    merged = {"node": "disk", "target": "b", "bitmaps": ["merged"]}
    disk.qmp.execute("block-dirty-bitmap-merge", merged)
    return [1, 2, 8]


def clear(disk: KeptDisk) -> list[int]:
    disk.change_bitmap("clear")
    return []


def clear_and_write(disk: KeptDisk) -> list[int]:
    disk.change_bitmap("clear")
    disk.write([2, 30])
    return [2, 30]


def disable(disk: KeptDisk) -> list[int]:
    disk.change_bitmap("disable")
    disk.write([5])
    return [1, 2]


def enable_again(disk: KeptDisk) -> list[int]:
    disk.change_bitmap("disable")
    disk.write([5])
    disk.change_bitmap("enable")
    disk.write([6])
    return [1, 2, 6]


def transact(disk: KeptDisk) -> list[int]:
    disk.add_bitmap("copy", disabled=True)
    merged = {"node": "disk", "target": "copy", "bitmaps": ["b"]}
    actions = [
        {"type": "block-dirty-bitmap-merge", "data": merged},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "b"}},
    ]
    disk.qmp.execute("transaction", {"actions": actions})
    disk.check_dirty([1, 2], "copy")
    return []


def back_up(disk: KeptDisk) -> list[int]:
    disk.back_up("full")
    disk.write([4])
    disk.back_up("incremental")
    return []


def cancel_a_backup(disk: KeptDisk) -> list[int]:
    disk.begin_slow_backup("full")
    disk.write([4])
    disk.qmp.execute("block-job-cancel", {"device": "backup"})
    disk.qmp.wait_event("BLOCK_JOB_CANCELLED")
    return [1, 2, 4]


CHANGES = [
    merge,
    clear,
    clear_and_write,
    disable,
    enable_again,
    transact,
    cancel_a_backup,
    back_up,
]


def test_what_was_answered_is_durable(disk: KeptDisk) -> None:
    for change in CHANGES:
        for verb in ("enable", "clear"):
            disk.change_bitmap(verb)
        disk.write([1, 2])
        granules = change(disk)
        recording = disk.infos()["b"]["recording"]
        killed(disk)
        assert disk.infos()["b"]["recording"] == recording, change
        disk.check_dirty(granules)


def resize(disk: KeptDisk, size: int) -> None:
    disk.qmp.execute("block_resize", {"node-name": "disk", "size": size})


def test_resized_disks_keep_their_bits(disk: KeptDisk) -> None:
    disk.write([1, 2, 1000])
    disk.unexport()
    resize(disk, 80 * MIB)
    resize(disk, 48 * MIB)
    killed(disk)
    disk.unexport()
    resize(disk, 64 * MIB)
    # What was cut off and came back is not what the backup has.
    disk.check_dirty([1, 2, *range(768, 1024)])
    killed(disk)
    disk.check_dirty([1, 2, *range(768, 1024)])


def test_an_overlay_has_bitmaps_of_its_own(disk: KeptDisk) -> None:
    disk.write([1])
    overlay = {"node-name": "disk", "snapshot-file": str(disk.directory / "overlay.qcow2")}
    disk.qmp.execute(
        "blockdev-snapshot-sync", {**overlay, "snapshot-node-name": "overlay", "format": "qcow2"}
    )
    disk.write([2])
    disk.check_dirty([1])
    killed(disk)
    disk.check_dirty([1])
