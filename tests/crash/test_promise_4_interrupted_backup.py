"""Promise 4: a backup that was killed is told of, its bitmap has all, the next one repairs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import KeptDisk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    disk.start()
    yield disk
    disk.end()


def test_an_incremental_backup_is_repaired_by_the_next(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write(range(40), byte=1)
    disk.back_up("full")
    disk.write(range(20, 60), byte=2)
    disk.begin_slow_backup("incremental")
    disk.write([100], byte=3)
    disk.kill()
    assert disk.mark.exists()

    disk.start()
    assert disk.qmp.execute("query-block-jobs") == []
    assert disk.qmp.execute("query-jobs") == []
    told = f"backup 'backup' of node 'disk' to '{disk.target}' (sync incremental) did not end"
    assert told in disk.daemon.log()
    disk.check_dirty([*range(20, 60), 100])
    disk.back_up("incremental")
    assert not disk.mark.exists()
    assert disk.same_as_target()


def test_a_full_backup_needs_a_full_one(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write(range(40))
    disk.begin_slow_backup("full")
    disk.kill()

    disk.start()
    disk.check_dirty(range(40))
    disk.back_up("incremental")
    assert disk.mark.exists()
    disk.back_up("full")
    assert not disk.mark.exists()
    assert disk.same_as_target()


def test_what_is_told_is_told_once(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write([1])
    disk.begin_slow_backup("full")
    disk.kill()
    for _ in range(2):
        disk.start()
        disk.quit()
    assert disk.daemon.log().count("did not end when blockd did") == 1


def test_nothing_is_told_of_a_backup_that_ended(disk: KeptDisk) -> None:
    disk.add_bitmap()
    disk.write([1])
    disk.back_up("full")
    disk.kill()
    disk.start()
    assert "did not end when blockd did" not in disk.daemon.log()
