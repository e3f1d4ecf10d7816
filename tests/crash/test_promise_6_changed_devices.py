"""Promise 6, for devices: the bitmaps of one are never taken for those of another."""

from __future__ import annotations

from pathlib import Path

from blockd.state.records import Identity
from tests.helpers.kept_disk import DISK_BYTES, KeptDisk
from tests.helpers.loop_device import loop_device


def make_file(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


def test_a_device_without_a_name_of_its_own_has_not_moved() -> None:
    """Such as virtio disks that were given no serial number: one is like the other."""
    first, second = Identity(-1, 1, size_bytes=1), Identity(-1, 2, size_bytes=1)
    assert not first.surely_same_storage(second)
    named = Identity(-1, 1, serial="disk-1", size_bytes=1)
    assert named.surely_same_storage(Identity(-1, 2, serial="disk-1", size_bytes=1))
    assert not named.surely_same_storage(first)
    assert not first.surely_same_storage(named)


def test_a_loop_device_is_known_by_its_file(tmp_path: Path) -> None:
    one, other = make_file(tmp_path / "one"), make_file(tmp_path / "other")
    with loop_device(one) as device:
        disk = KeptDisk(tmp_path, image=Path(device))
        disk.start()
        try:
            disk.add_bitmap()
            disk.write([1, 2])
            disk.quit()
            with loop_device(other) as another:
                disk.image = Path(another)
                disk.start()
                assert disk.infos() == {}
                disk.quit()
        finally:
            disk.end()
