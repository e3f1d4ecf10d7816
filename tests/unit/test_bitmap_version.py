"""What a store goes by: whether a bitmap's bits changed by anything but guest writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockd.bitmap import Bits, DirtyBitmap, NodeBitmaps, Reason

SIZE = 1024 * 1024
Change = Callable[[NodeBitmaps, DirtyBitmap], object]

#: What may change any bit, and what changes none or only adds what the guest writes.
CHANGES: dict[str, tuple[bool, Change]] = {
    "write": (False, lambda node, _: node.recent.append((0, 512))),
    "disable": (False, lambda _, bitmap: bitmap.disable()),
    "enable": (False, lambda _, bitmap: bitmap.enable()),
    "freeze": (False, lambda _, bitmap: bitmap.freeze("job")),
    "reclaim": (False, lambda _, bitmap: bitmap.freeze("job").reclaim()),
    "pin and release": (False, lambda _, bitmap: bitmap.pin("export").release()),
    "abdicate": (True, lambda _, bitmap: bitmap.freeze("job").abdicate()),
    "clear": (True, lambda _, bitmap: bitmap.clear()),
    "put_back": (True, lambda _, bitmap: bitmap.put_back(Bits(SIZE, 65536))),
    "merge": (True, lambda _, bitmap: bitmap.merge_from([Bits(SIZE, 512)])),
    "distrust": (True, lambda _, bitmap: bitmap.distrust(Reason.IMAGE_CHANGED)),
    "resize": (True, lambda node, _: node.resize(2 * SIZE)),
}


@pytest.mark.parametrize(("rises", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_the_version_rises_with_every_other_change(rises: bool, change: Change) -> None:
    node = NodeBitmaps(SIZE)
    bitmap = node.add("b", 65536)
    before = bitmap.version
    change(node, bitmap)
    node.fold()
    assert (bitmap.version > before) == rises


def test_what_is_not_trusted_any_more_is_all_dirty_in_every_state() -> None:
    node = NodeBitmaps(SIZE)
    on, off, pinned, reclaimed, abdicated = (node.add(name, 65536) for name in "abcde")
    off.disable()
    pin, freezes = pinned.pin("export"), [each.freeze("job") for each in (reclaimed, abdicated)]
    for bitmap in node.list():
        bitmap.distrust(Reason.IMAGE_CHANGED)
        assert bitmap.reason is Reason.IMAGE_CHANGED
    # The job reads on what it began with.
    assert reclaimed.count_bytes == 0
    pin.release()
    freezes[0].reclaim()
    freezes[1].abdicate()
    for bitmap in (on, off, pinned, reclaimed, abdicated):
        assert bitmap.count_bytes == SIZE


def test_a_reason_stays_until_the_bitmap_is_cleared_or_backed_up() -> None:
    node = NodeBitmaps(SIZE)
    cleared, backed_up, failed = (node.add(name, 65536) for name in "abc")
    for bitmap in (cleared, backed_up, failed):
        bitmap.reason = Reason.IMAGE_CHANGED
    cleared.clear()
    backed_up.freeze("job").abdicate()
    failed.freeze("job").reclaim()
    failed.merge_from([Bits(SIZE, 512)])
    assert [bitmap.reason for bitmap in (cleared, backed_up)] == [None, None]
    assert failed.reason is Reason.IMAGE_CHANGED
