"""The bitmaps of a node: recent writes, the listing, sizes, and who is told of a change."""

from __future__ import annotations

import pytest

from blockd.bitmap import Bits, NodeBitmaps

MIB = 1 << 20


def listing(node: NodeBitmaps) -> list[str | None]:
    return [info.name for info in node.infos()]


def runs(bits: Bits) -> list[tuple[int, int]]:
    return [(extent.offset, extent.length) for extent in bits.extents()]


# --- recent writes ---------------------------------------------------------------------------


def test_fold_marks_every_recording_bitmap() -> None:
    node = NodeBitmaps(MIB + 700)
    fine, coarse = node.add("fine", 512), node.add("coarse", 65536)
    frozen = node.add("frozen", 4096)
    freeze = frozen.freeze("job")
    stopped = node.add("stopped", 512, disabled=True)
    recent = node.recent
    # One granule, two, many, a range of both kinds, and the very end of the disk.
    recent += [(0, 1), (4095, 2), (65535, 131074), (MIB + 699, 1)]
    node.fold()
    assert node.recent is recent
    assert recent == []
    assert runs(fine.usable_bits()) == [(0, 512), (3584, 1024), (65024, 132096), (MIB + 512, 188)]
    assert runs(coarse.usable_bits()) == [(0, 262144), (MIB, 700)]
    assert runs(freeze.successor) == [(0, 8192), (61440, 139264), (MIB, 700)]
    assert (freeze.snapshot.any(), stopped.count_bytes) == (False, 0)


def test_writes_without_a_recording_bitmap_are_forgotten() -> None:
    node = NodeBitmaps(MIB)
    node.recent.append((0, 512))
    bitmap = node.add("late", 512)
    assert node.recent == []
    assert bitmap.count_bytes == 0


def test_whole_disk_discard() -> None:
    node = NodeBitmaps(1 << 44)
    bitmap = node.add("b", 65536)
    node.recent.append((0, 1 << 44))
    assert bitmap.count_bytes == 1 << 44


# --- who is told -----------------------------------------------------------------------------


def test_on_change_tells_when_recording_begins_and_ends() -> None:
    node = NodeBitmaps(MIB)
    told: list[bool] = []
    node.on_change = lambda: told.append(node.any_recording)
    stopped = node.add("stopped", 512, disabled=True)
    assert told == []
    recording = node.add("recording", 512)
    assert told == [True]
    pin = recording.pin("export")
    freeze = stopped.freeze("job")
    pin.release()
    freeze.abdicate()
    stopped.disable()
    assert told == [True]
    recording.disable()
    assert told == [True, False]
    recording.enable()
    node.remove("recording")
    assert told == [True, False, True, False]


# --- the listing -----------------------------------------------------------------------------


@pytest.mark.parametrize("succeeds", [False, True])
def test_listing_is_the_peers(*, succeeds: bool) -> None:
    """The order seen on qemu-storage-daemon 10.0.2: a successor is as new as its freeze."""
    node = NodeBitmaps(MIB)
    for name in ("old", "frozen", "new"):
        node.add(name, 512)
    frozen = node.get("frozen")
    freeze = frozen.freeze("job")
    node.add("late", 512)
    node.recent.append((0, 512))
    assert listing(node) == ["late", None, "new", "frozen", "old"]
    successor, named = node.infos()[1], node.infos()[3]
    assert (successor.recording, successor.busy, successor.count_bytes) == (True, False, 512)
    assert (named.recording, named.busy, named.count_bytes) == (True, True, 0)
    if succeeds:
        freeze.abdicate()
        assert listing(node) == ["late", "frozen", "new", "old"]
    else:
        freeze.reclaim()
        assert listing(node) == ["late", "new", "frozen", "old"]
    assert [bitmap.name for bitmap in node.list()] == listing(node)


def test_successor_of_a_disabled_bitmap() -> None:
    node = NodeBitmaps(MIB)
    node.add("b", 512, disabled=True).freeze("job")
    assert [(info.name, info.recording, info.busy) for info in node.infos()] == [
        (None, False, False),
        ("b", False, True),
    ]


# --- sizes -----------------------------------------------------------------------------------


def test_resize_as_the_peer() -> None:
    """Counts seen on qemu-storage-daemon 10.0.2 with a write of 512 bytes at 1049600."""
    node = NodeBitmaps(MIB + 1536)
    bitmaps = [node.add(f"g{size}", size) for size in (512, 4096, 65536)]
    node.recent.append((1049600, 512))
    node.resize(MIB + 1536 + 131072)
    assert [bitmap.count_bytes for bitmap in bitmaps] == [512, 4096, 65536]
    node.resize(MIB + 512)
    assert [bitmap.count_bytes for bitmap in bitmaps] == [0, 4096, 65536]
    node.resize(MIB)
    assert [bitmap.count_bytes for bitmap in bitmaps] == [0, 0, 0]
    assert node.add("new", 512).usable_bits().size_bytes == MIB


def test_what_was_cut_off_and_comes_back_is_dirty() -> None:
    """Its content has changed since the last backup; only where it never was is it clean."""
    node = NodeBitmaps(10 * 4096)
    recording, stopped = node.add("r", 4096), node.add("s", 4096, disabled=True)
    freeze = node.add("f", 4096).freeze("job")
    node.resize(6 * 4096)
    node.resize(8 * 4096)
    node.resize(20 * 4096)
    assert runs(recording.usable_bits()) == [(6 * 4096, 4 * 4096)]
    assert runs(freeze.successor) == [(6 * 4096, 4 * 4096)]
    assert not freeze.snapshot.any()
    assert not stopped.usable_bits().any()


def test_resize_in_use() -> None:
    node = NodeBitmaps(8 * 4096)
    frozen, pinned = node.add("f", 4096), node.add("p", 4096)
    node.recent.append((0, 8 * 4096))
    freeze, pin = frozen.freeze("job"), pinned.pin("export")
    node.recent.append((7 * 4096, 1))
    keep = freeze.snapshot.copy()
    node.resize(2 * 4096)
    assert (freeze.snapshot.count_bytes, freeze.successor.count_bytes) == (8192, 0)
    freeze.abdicate(keep)
    pin.release()
    for bitmap in (frozen, pinned):
        assert (bitmap.usable_bits().size_bytes, bitmap.count_bytes) == (8192, 8192)
