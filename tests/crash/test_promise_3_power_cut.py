"""Promise 3: after a power cut all is dirty that must be, and besides only what was armed lately.

The next boot is one of a name space: a daemon sees another boot's id and time. What a power cut may
do to the files is held against every cut by the tests of the store; here they are as they were, but
for the marks, which nobody syncs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.kept_disk import KeptDisk
from tests.helpers.tools import require_tool

#: Of a region that is armed at once.
REGION_GRANULES = 256

_PRETEND = """
mount --bind "$1" /proc/sys/kernel/random/boot_id && mount --bind "$2" /proc/stat || exit 77
shift 2
exec "$@"
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KeptDisk]:
    disk = KeptDisk(tmp_path)
    yield disk
    disk.end()


def boot(disk: KeptDisk, name: str) -> None:
    """The daemons that are started from now on live in this boot, which has just begun."""
    boot_id, stat = (disk.directory / f"{name}.{file}" for file in ("boot_id", "stat"))
    boot_id.write_text(f"{name}\n")
    # Whole seconds: nothing was written to before it that seems to have come after it.
    stat.write_text(f"btime {int(time.time()) + 1}\n")
    shell = [require_tool("unshare"), "--mount", "sh", "-c", _PRETEND, "sh"]
    disk.daemon.program = [*shell, str(boot_id), str(stat), sys.executable, "-m", "blockd"]


def lose_marks(disk: KeptDisk) -> None:
    """What was in the page cache alone."""
    for path in (disk.state / "marks").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:4096] + bytes(len(content[4096:])))


def test_what_was_armed_is_dirty_and_nothing_else(disk: KeptDisk) -> None:
    boot(disk, "first")
    disk.start()
    disk.add_bitmap()
    disk.write([1, 2, 700])
    disk.kill()
    lose_marks(disk)
    boot(disk, "second")
    disk.start()
    regions = (0, 700 // REGION_GRANULES)
    disk.check_dirty(
        granule
        for region in regions
        for granule in range(region * REGION_GRANULES, (region + 1) * REGION_GRANULES)
    )
    assert "reason" not in disk.infos()["b"]
    disk.change_bitmap("clear")
    disk.write([3])
    disk.kill()
    disk.start()
    disk.check_dirty([3])


def test_after_a_clean_end_nothing_else_is_dirty(disk: KeptDisk) -> None:
    boot(disk, "first")
    disk.start()
    disk.add_bitmap()
    disk.write([1, 2, 700])
    disk.quit()
    lose_marks(disk)
    boot(disk, "second")
    disk.start()
    disk.check_dirty([1, 2, 700])


def test_what_somebody_wrote_between_is_found_out(disk: KeptDisk) -> None:
    boot(disk, "first")
    disk.start()
    disk.add_bitmap()
    disk.write([1])
    disk.kill()
    boot(disk, "second")
    later = time.time() + 5
    with disk.image.open("r+b") as file:
        file.write(b"!")
    os.utime(disk.image, (later, later))
    disk.start()
    disk.check_all_dirty("image-changed")
