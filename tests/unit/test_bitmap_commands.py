"""One bitmap: which command is refused in which state, with the peer's words, and the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockd.bitmap import (
    BitmapInfo,
    Bits,
    DirtyBitmap,
    Frozen,
    NodeBitmaps,
    Pinned,
    Recording,
    Stopped,
    default_granularity_bytes,
)
from blockd.errors import BlockdError

SIZE = 1 << 20
GRANULARITY = 65536


@pytest.fixture
def node() -> NodeBitmaps:
    return NodeBitmaps(SIZE)


@pytest.fixture
def bitmap(node: NodeBitmaps) -> DirtyBitmap:
    return node.add("b", GRANULARITY)


def write(node: NodeBitmaps, *granules: int) -> None:
    node.recent.extend((granule * GRANULARITY, 1) for granule in granules)


def dirty(bits: Bits) -> set[int]:
    return {
        granule
        for extent in bits.extents()
        for granule in range(extent.offset // GRANULARITY, extent.end // GRANULARITY)
    }


def bits_of(*granules: int, granularity: int = GRANULARITY) -> Bits:
    bits = Bits(SIZE, granularity)
    bits.update_granules(granules)
    return bits


# --- add, remove, get ------------------------------------------------------------------------

GRANULARITY_REFUSED = "Granularity must be power of 2 and at least 512"
NO_UINT32 = "Parameter 'granularity' expects uint32_t"


@pytest.mark.parametrize(
    ("name", "granularity", "refusal"),
    [
        ("", GRANULARITY, "Bitmap name cannot be empty"),
        ("", 3, "Bitmap name cannot be empty"),
        ("b", GRANULARITY, "Bitmap already exists: b"),
        ("b", 3, GRANULARITY_REFUSED),
        ("n" * 1024, GRANULARITY, "Bitmap name too long: " + "n" * 1024),
        ("é" * 512, GRANULARITY, "Bitmap name too long: " + "é" * 512),
        ("n" * 1024, 3, GRANULARITY_REFUSED),
        ("n", 0, GRANULARITY_REFUSED),
        ("n", 256, GRANULARITY_REFUSED),
        ("n", 513, GRANULARITY_REFUSED),
        ("n", (1 << 31) + 1, GRANULARITY_REFUSED),
        ("n", 1 << 32, NO_UINT32),
        ("", 1 << 32, NO_UINT32),
        ("n", -1, NO_UINT32),
    ],
)
def test_refused_add(
    node: NodeBitmaps, bitmap: DirtyBitmap, name: str, granularity: int, refusal: str
) -> None:
    with pytest.raises(BlockdError) as refused:
        node.add(name, granularity)
    assert refused.value.message == refusal
    assert node.list() == (bitmap,)


@pytest.mark.parametrize(
    ("name", "granularity"), [("n" * 1023, 512), ("é" * 511, 1 << 31), ("b b", 4096)]
)
def test_add(node: NodeBitmaps, name: str, granularity: int) -> None:
    added = node.add(name, granularity)
    assert node.get(name) is added
    assert node.infos() == (
        BitmapInfo(name, 0, granularity, recording=True, busy=False, persistent=False),
    )


def test_missing(node: NodeBitmaps, bitmap: DirtyBitmap) -> None:
    for command in (node.get, node.remove):
        with pytest.raises(BlockdError, match=r"^Dirty bitmap 'zz' not found$"):
            command("zz")
    node.remove("b")
    with pytest.raises(BlockdError, match=r"^Dirty bitmap 'b' not found$"):
        node.get("b")


@pytest.mark.parametrize(
    ("cluster_size", "granularity"),
    [(None, 65536), (512, 4096), (4096, 4096), (16384, 16384), (65536, 65536), (1 << 21, 65536)],
)
def test_default_granularity(cluster_size: int | None, granularity: int) -> None:
    assert default_granularity_bytes(cluster_size) == granularity


# --- refusals in use -------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[NodeBitmaps], object]] = {
    "remove": lambda node: node.remove("b"),
    "clear": lambda node: node.get("b").clear(),
    "enable": lambda node: node.get("b").enable(),
    "disable": lambda node: node.get("b").disable(),
    "merge into": lambda node: node.get("b").merge_from([bits_of(9)]),
    "merge into, of nothing": lambda node: node.get("b").merge_from([]),
    "merge from": lambda node: node.get("b").usable_bits(),
    "check": lambda node: node.get("b").check_usable(to_change=False),
    "check to change": lambda node: node.get("b").check_usable(to_change=True),
    "freeze": lambda node: node.get("b").freeze("other job"),
    "pin": lambda node: node.get("b").pin("other export"),
}

USES: dict[str, Callable[[DirtyBitmap], object]] = {
    "freeze": lambda bitmap: bitmap.freeze("job"),
    "pin": lambda bitmap: bitmap.pin("export"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_busy(
    node: NodeBitmaps,
    bitmap: DirtyBitmap,
    use: Callable[[DirtyBitmap], object],
    command: Callable[[NodeBitmaps], object],
) -> None:
    write(node, 1)
    use(bitmap)
    write(node, 2)
    before, state = node.infos(), bitmap.state
    with pytest.raises(BlockdError) as refused:
        command(node)
    assert refused.value.message == (
        "Bitmap 'b' is currently in use by another operation and cannot be used"
    )
    assert bitmap.state is state
    assert node.infos() == before
    assert bitmap.busy
    with pytest.raises(BlockdError, match=r"^Bitmap already exists: b$"):
        node.add("b", GRANULARITY)


# --- enable, disable, clear, merge -----------------------------------------------------------


def test_enable_and_disable(node: NodeBitmaps) -> None:
    bitmap = node.add("b", GRANULARITY, disabled=True)
    assert isinstance(bitmap.state, Stopped)
    write(node, 1)
    bitmap.enable()
    bitmap.enable()
    assert isinstance(bitmap.state, Recording)
    write(node, 2)
    bitmap.disable()
    bitmap.disable()
    write(node, 3)
    assert isinstance(bitmap.state, Stopped)
    assert dirty(bitmap.usable_bits()) == {2}


def test_clear_takes_writes_before_it_only(node: NodeBitmaps, bitmap: DirtyBitmap) -> None:
    write(node, 1)
    bitmap.clear()
    write(node, 2)
    assert dirty(bitmap.usable_bits()) == {2}


def test_merge_takes_all_or_nothing(bitmap: DirtyBitmap) -> None:
    with pytest.raises(BlockdError, match=r"^Bitmaps are of different sizes"):
        bitmap.merge_from([bits_of(1), Bits(SIZE - 512, GRANULARITY)])
    assert bitmap.count_bytes == 0
    bitmap.merge_from([])
    assert bitmap.count_bytes == 0
    bitmap.merge_from([bits_of(1), bits_of(4095, granularity=256), bitmap.usable_bits()])
    assert dirty(bitmap.usable_bits()) == {1, 15}


def test_merge_into_a_disabled_bitmap(node: NodeBitmaps) -> None:
    bitmap = node.add("b", GRANULARITY, disabled=True)
    bitmap.merge_from([bits_of(3)])
    assert (bitmap.count_bytes, bitmap.recording) == (GRANULARITY, False)


# --- freeze ----------------------------------------------------------------------------------


@pytest.mark.parametrize("disabled", [False, True])
def test_frozen(node: NodeBitmaps, *, disabled: bool) -> None:
    bitmap = node.add("b", GRANULARITY, disabled=disabled)
    bitmap.merge_from([bits_of(1)])
    freeze = bitmap.freeze("job0")
    write(node, 2)
    state = bitmap.state
    assert isinstance(state, Frozen)
    assert (state.job, state.recording) == ("job0", not disabled)
    assert (state.snapshot, state.successor) == (freeze.snapshot, freeze.successor)
    assert dirty(freeze.snapshot) == {1}
    assert dirty(freeze.successor) == (set() if disabled else {2})
    assert (bitmap.recording, bitmap.busy) == (not disabled, True)
    assert (bitmap.count_bytes, bitmap.granularity_bytes) == (GRANULARITY, GRANULARITY)
    freeze.reclaim()
    assert dirty(bitmap.usable_bits()) == ({1} if disabled else {1, 2})
    assert (bitmap.recording, bitmap.busy) == (not disabled, False)


def test_a_copy_of_a_frozen_bitmap_is_that_of_its_start(
    node: NodeBitmaps, bitmap: DirtyBitmap
) -> None:
    write(node, 1)
    freeze = bitmap.freeze("job")
    write(node, 2)
    copied = bitmap.copy_bits()
    assert dirty(copied) == {1}
    freeze.reclaim()
    assert (dirty(copied), dirty(bitmap.copy_bits())) == ({1}, {1, 2})


def test_reclaim_with_nothing_written(node: NodeBitmaps, bitmap: DirtyBitmap) -> None:
    write(node, 1, 5)
    before, digest = node.infos(), bitmap.copy_bits().digest()
    bitmap.freeze("job").reclaim()
    assert (node.infos(), bitmap.copy_bits().digest()) == (before, digest)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (None, {2}),
        (bits_of(7), {2, 7}),
        (bits_of(4, granularity=1 << 17), {2, 8, 9}),
        (bits_of(3 * 128 + 5, granularity=512), {2, 3}),
    ],
    ids=["nothing", "same granularity", "coarser", "finer"],
)
def test_abdicate(
    node: NodeBitmaps, bitmap: DirtyBitmap, keep: Bits | None, left: set[int]
) -> None:
    write(node, 1)
    freeze = bitmap.freeze("job")
    write(node, 2)
    freeze.abdicate(keep)
    write(node, 4)
    assert dirty(bitmap.usable_bits()) == left | {4}
    assert isinstance(bitmap.state, Recording)


def test_abdicate_may_keep_the_snapshot(node: NodeBitmaps, bitmap: DirtyBitmap) -> None:
    write(node, 1)
    freeze = bitmap.freeze("job")
    write(node, 2)
    freeze.abdicate(freeze.snapshot)
    assert dirty(bitmap.usable_bits()) == {1, 2}


def test_a_freeze_ends_once(node: NodeBitmaps, bitmap: DirtyBitmap) -> None:
    first = bitmap.freeze("job")
    first.reclaim()
    bitmap.freeze("next job")
    before = node.infos()
    for again in (first.reclaim, first.abdicate):
        with pytest.raises(RuntimeError, match="has ended"):
            again()
    assert node.infos() == before


# --- pin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("disabled", [False, True])
def test_pinned(node: NodeBitmaps, *, disabled: bool) -> None:
    bitmap = node.add("b", GRANULARITY, disabled=disabled)
    pin = bitmap.pin("export0")
    write(node, 3)
    state = bitmap.state
    assert isinstance(state, Pinned)
    assert state.holder == "export0"
    assert dirty(state.bits) == (set() if disabled else {3})
    assert bitmap.recording == (not disabled)
    pin.release()
    assert not bitmap.busy
    assert bitmap.recording == (not disabled)
    bitmap.pin("another")
    with pytest.raises(RuntimeError, match="has ended"):
        pin.release()
    assert bitmap.busy
