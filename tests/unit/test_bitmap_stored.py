"""Bitmaps that come from an image: inconsistent ones, and those that can't be written back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockd.bitmap import Bits, DirtyBitmap, Inconsistent, NodeBitmaps, Recording, Stopped
from blockd.errors import BlockdError

SIZE = 1 << 20
GRANULARITY = 65536

CHANGES: dict[str, Callable[[NodeBitmaps, DirtyBitmap], object]] = {
    "clear": lambda _, bitmap: bitmap.clear(),
    "merge": lambda _, bitmap: bitmap.merge_from([]),
    "check": lambda _, bitmap: bitmap.check_usable(to_change=True),
}
USES: dict[str, Callable[[NodeBitmaps, DirtyBitmap], object]] = {
    "enable": lambda _, bitmap: bitmap.enable(),
    "disable": lambda _, bitmap: bitmap.disable(),
    "merge from": lambda _, bitmap: bitmap.usable_bits(),
    "check": lambda _, bitmap: bitmap.check_usable(to_change=False),
    "freeze": lambda _, bitmap: bitmap.freeze("job").reclaim(),
    "pin": lambda _, bitmap: bitmap.pin("export").release(),
}


@pytest.fixture
def node() -> NodeBitmaps:
    return NodeBitmaps(SIZE)


def bits() -> Bits:
    marked = Bits(SIZE, GRANULARITY)
    marked.mark(0, 1)
    return marked


def test_they_are_as_they_were_stored(node: NodeBitmaps) -> None:
    on = node.add_kept("on", Recording(bits()), read_only=False)
    off = node.add_kept("off", Stopped(bits()), read_only=False)
    node.recent.append((GRANULARITY, 1))
    assert (on.count_bytes, off.count_bytes) == (2 * GRANULARITY, GRANULARITY)
    assert [info.name for info in node.infos()] == ["off", "on"]
    assert all(info.persistent and not info.inconsistent for info in node.infos())
    with pytest.raises(BlockdError, match="Bitmap already exists: on"):
        node.add_kept("on", Stopped(bits()), read_only=False)


@pytest.mark.parametrize("change", [*CHANGES.values(), lambda node, _: node.remove("b")])
def test_a_read_only_one_is_not_changed(
    node: NodeBitmaps, change: Callable[[NodeBitmaps, DirtyBitmap], object]
) -> None:
    bitmap = node.add_kept("b", Recording(bits()), read_only=True)
    with pytest.raises(BlockdError, match=r"^Bitmap 'b' is readonly and cannot be modified$"):
        change(node, bitmap)
    assert bitmap.count_bytes == GRANULARITY


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_read_only_one_is_used(
    node: NodeBitmaps, use: Callable[[NodeBitmaps, DirtyBitmap], object]
) -> None:
    bitmap = node.add_kept("b", Recording(bits()), read_only=True)
    use(node, bitmap)
    assert bitmap.count_bytes == GRANULARITY


@pytest.mark.parametrize("use", [*CHANGES.values(), *USES.values()])
@pytest.mark.parametrize("read_only", [False, True])
def test_an_inconsistent_one_can_only_be_removed(
    node: NodeBitmaps,
    use: Callable[[NodeBitmaps, DirtyBitmap], object],
    read_only: bool,
) -> None:
    state = Inconsistent(Bits(SIZE, GRANULARITY))
    bitmap = node.add_kept("b", state, read_only=read_only)
    with pytest.raises(BlockdError, match=r"is inconsistent and cannot|is readonly and cannot"):
        use(node, bitmap)
    assert not node.any_recording
    (info,) = node.infos()
    assert (info.inconsistent, info.recording, info.count_bytes) == (True, False, 0)
    node.resize(2 * SIZE)
    assert bitmap.copy_bits().size_bytes == 2 * SIZE
    if not read_only:
        node.remove("b")
        assert node.infos() == ()
