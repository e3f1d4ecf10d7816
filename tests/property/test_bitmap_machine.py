"""Bitmaps of two nodes under any sequence of commands, against plain sets of granule numbers.

Beside the exact model, each bitmap carries the truth it exists for: the sectors that changed since
the last good backup. Whatever happens, they are covered (specification, section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from blockd import limits
from blockd.bitmap import (
    Bits,
    DirtyBitmap,
    Freeze,
    Frozen,
    Inconsistent,
    NodeBitmaps,
    Pin,
    Pinned,
    Recording,
    State,
    Stopped,
)
from blockd.errors import BlockdError

SECTOR = 512
MAX_SECTORS = 300

NODES = st.integers(0, 1)
NAMES = st.sampled_from(["a", "b", "c"])
GRANULARITIES = st.sampled_from([512, 1024, 2048, 8192])
SECTORS = st.integers(0, MAX_SECTORS)
#: Mostly one block or a few, as a guest writes; sometimes all the disk.
LENGTHS = st.one_of(st.integers(1, 3 * SECTOR), st.integers(1, MAX_SECTORS * SECTOR))


@dataclass
class Model:
    """One bitmap. ``named`` and ``successor`` are granules, the ``changed…`` are sectors."""

    granularity: int
    rank: int
    recording: bool
    named: set[int] = field(default_factory=set)
    use: str = "free"
    successor: set[int] = field(default_factory=set)
    successor_rank: int = 0
    changed: set[int] = field(default_factory=set)
    #: Of ``changed``, what changed since the freeze.
    changed_since: set[int] = field(default_factory=set)

    def touched(self, sectors: Iterable[int]) -> set[int]:
        """The granules that the sectors lie in."""
        return {sector * SECTOR // self.granularity for sector in sectors}

    def sectors(self, granules: Iterable[int], size: int) -> set[int]:
        each = self.granularity // SECTOR
        return {
            sector
            for granule in granules
            for sector in range(granule * each, min((granule + 1) * each, size))
        }

    def write(self, sectors: set[int]) -> None:
        if not self.recording:
            return
        self.changed |= sectors
        if self.use == "frozen":
            self.changed_since |= sectors
            self.successor |= self.touched(sectors)
        else:
            self.named |= self.touched(sectors)

    def cut(self, size: int) -> None:
        """Forget what lies from sector ``size`` on."""
        end = -(-size * SECTOR // self.granularity)
        for granules in (self.named, self.successor):
            granules -= {granule for granule in granules if granule >= end}
        for sectors in (self.changed, self.changed_since):
            sectors -= {sector for sector in sectors if sector >= size}


@dataclass
class NodeModel:
    size: int
    largest: int
    ranks: int = 0
    bitmaps: dict[str, Model] = field(default_factory=dict)

    def next_rank(self) -> int:
        self.ranks += 1
        return self.ranks

    def write(self, sectors: set[int]) -> None:
        for model in self.bitmaps.values():
            model.write(sectors)

    def resize(self, size: int) -> None:
        for model in self.bitmaps.values():
            model.cut(size)
        self.write(set(range(self.size, min(size, self.largest))))
        self.size, self.largest = size, max(size, self.largest)


@dataclass(frozen=True)
class Used:
    """A token, and the model of the bitmap that it holds."""

    node: NodeModel
    model: Model
    token: Freeze | Pin


def granules(bits: Bits) -> set[int]:
    size = bits.granularity_bytes
    return {
        granule
        for extent in bits.extents()
        for granule in range(extent.offset // size, -(-extent.end // size))
    }


def kind(state: State) -> tuple[str, bool]:
    match state:
        case Recording():
            return "free", True
        case Stopped():
            return "free", False
        case Frozen(recording=recording):
            return "frozen", recording
        case Pinned(recording=recording):
            return "pinned", recording
        case Inconsistent():
            return "inconsistent", False


def bits_of(state: State) -> tuple[set[int], set[int]]:
    """The named granules and those of the successor."""
    match state:
        case (
            Recording(bits=bits) | Stopped(bits=bits) | Pinned(bits=bits) | Inconsistent(bits=bits)
        ):
            return granules(bits), set()
        case Frozen(snapshot=snapshot, successor=successor):
            return granules(snapshot), granules(successor)


class Bitmaps(RuleBasedStateMachine):
    freezes: Bundle[Used] = Bundle("freezes")
    pins: Bundle[Used] = Bundle("pins")
    spent: Bundle[Used] = Bundle("spent")

    @initialize(size=SECTORS)
    def start(self, size: int) -> None:
        self.models = [NodeModel(size, size) for _ in range(2)]
        self.nodes = [NodeBitmaps(size * SECTOR) for _ in range(2)]
        self.told = [False, False]
        for index, node in enumerate(self.nodes):
            node.on_change = self._listener(index)
            self.add(index, "a", 1024, disabled=False)

    def _listener(self, index: int) -> Callable[[], None]:
        def listen() -> None:
            assert self.told[index] != self.nodes[index].any_recording, "told without a change"
            self.told[index] = self.nodes[index].any_recording

        return listen

    def _find(self, index: int, name: str) -> tuple[DirtyBitmap, Model] | None:
        """The bitmap and its model; one that does not exist is refused by its name."""
        model = self.models[index].bitmaps.get(name)
        if model is None:
            with pytest.raises(BlockdError, match=f"^Dirty bitmap '{name}' not found$"):
                self.nodes[index].get(name)
            return None
        return self.nodes[index].get(name), model

    def _refused(self, model: Model, command: Callable[[], object]) -> bool:
        """Run the command; true where the bitmap was in use, so that it had to be refused."""
        if model.use == "free":
            return False
        with pytest.raises(BlockdError, match=r"is currently in use by another operation"):
            command()
        return True

    # -- the guest ---------------------------------------------------------------------------

    @rule(index=NODES, offset=st.integers(0, MAX_SECTORS * SECTOR), length=LENGTHS)
    def write(self, index: int, offset: int, length: int) -> None:
        model = self.models[index]
        end = min(offset + length, model.size * SECTOR)
        if offset < end:
            self.nodes[index].recent.append((offset, end - offset))
            model.write(set(range(offset // SECTOR, (end - 1) // SECTOR + 1)))

    @rule(index=NODES)
    def fold(self, index: int) -> None:
        self.nodes[index].fold()
        assert self.nodes[index].recent == []

    @rule(index=NODES, size=SECTORS)
    def resize(self, index: int, size: int) -> None:
        self.nodes[index].resize(size * SECTOR)
        self.models[index].resize(size)

    @rule(index=NODES)
    def resize_to_the_other_nodes_size(self, index: int) -> None:
        """So that they can be merged again."""
        self.resize(index, self.models[1 - index].size)

    # -- commands ----------------------------------------------------------------------------

    @rule(index=NODES, name=NAMES, granularity=GRANULARITIES, disabled=st.booleans())
    def add(self, index: int, name: str, granularity: int, disabled: bool) -> None:
        node, model = self.nodes[index], self.models[index]
        if name in model.bitmaps:
            with pytest.raises(BlockdError, match=f"^Bitmap already exists: {name}$"):
                node.add(name, granularity, disabled=disabled)
            return
        node.add(name, granularity, disabled=disabled)
        model.bitmaps[name] = Model(granularity, model.next_rank(), not disabled)

    @rule(index=NODES, name=NAMES)
    def remove(self, index: int, name: str) -> None:
        if (found := self._find(index, name)) is None:
            return
        _, model = found
        if not self._refused(model, lambda: self.nodes[index].remove(name)):
            self.nodes[index].remove(name)
            del self.models[index].bitmaps[name]

    @rule(index=NODES, name=NAMES)
    def clear(self, index: int, name: str) -> None:
        if (found := self._find(index, name)) is None:
            return
        bitmap, model = found
        if not self._refused(model, bitmap.clear):
            bitmap.clear()
            model.named, model.changed = set(), set()

    @rule(index=NODES, name=NAMES, enable=st.booleans())
    def enable_or_disable(self, index: int, name: str, enable: bool) -> None:
        if (found := self._find(index, name)) is None:
            return
        bitmap, model = found
        command = bitmap.enable if enable else bitmap.disable
        if not self._refused(model, command):
            command()
            model.recording = enable

    @rule(index=NODES, name=NAMES, sources=st.lists(st.tuples(NODES, NAMES), max_size=3))
    def merge(self, index: int, name: str, sources: list[tuple[int, str]]) -> None:
        if (found := self._find(index, name)) is None:
            return
        target, model = found
        bits: list[Bits] = []
        models: list[Model] = []
        for source_index, source_name in sources:
            if (source := self._find(source_index, source_name)) is None:
                return
            if self._refused(source[1], source[0].usable_bits):
                return
            bits.append(source[0].usable_bits())
            models.append(source[1])
        if self._refused(model, lambda: target.merge_from(bits)):
            return
        size = self.models[index].size
        if any(each.size_bytes != size * SECTOR for each in bits):
            with pytest.raises(BlockdError, match=r"^Bitmaps are of different sizes"):
                target.merge_from(bits)
            return
        target.merge_from(bits)
        for each in models:
            model.named |= model.touched(each.sectors(each.named, size))
            model.changed |= each.changed

    # -- jobs and exports --------------------------------------------------------------------

    @rule(target=freezes, index=NODES, name=NAMES)
    def freeze(self, index: int, name: str) -> Used | MultipleResults[Used]:
        if (found := self._find(index, name)) is None:
            return multiple()
        bitmap, model = found
        if self._refused(model, lambda: bitmap.freeze("job")):
            return multiple()
        freeze = bitmap.freeze("job")
        model.use, model.successor_rank = "frozen", self.models[index].next_rank()
        assert granules(freeze.snapshot) == model.named
        return Used(self.models[index], model, freeze)

    @rule(target=spent, used=consumes(freezes))
    def reclaim(self, used: Used) -> Used:
        assert isinstance(used.token, Freeze)
        used.token.reclaim()
        model = used.model
        model.use = "free"
        model.named |= model.successor
        model.successor, model.changed_since = set(), set()
        return used

    @rule(
        target=spent,
        used=consumes(freezes),
        granularity=st.none() | GRANULARITIES,
        kept=st.sets(st.integers(0, MAX_SECTORS)),
    )
    def abdicate(self, used: Used, granularity: int | None, kept: set[int]) -> Used:
        """``kept`` are the blocks that the backup failed to copy: those stay changed."""
        assert isinstance(used.token, Freeze)
        model, size = used.model, used.node.size
        model.use, model.rank, model.named = "free", model.successor_rank, model.successor
        if granularity is None:
            used.token.abdicate()
            model.changed = model.changed_since
        else:
            # The node may have had another size when the job made its list.
            keep = Bits(MAX_SECTORS * SECTOR, granularity)
            keep.update_granules(kept)
            used.token.abdicate(keep)
            blocks = replace(model, granularity=granularity)
            sectors = blocks.sectors(kept, size)
            model.named |= model.touched(sectors)
            model.changed = model.changed_since | (model.changed & sectors)
        model.successor, model.changed_since = set(), set()
        return used

    @rule(target=pins, index=NODES, name=NAMES)
    def pin(self, index: int, name: str) -> Used | MultipleResults[Used]:
        if (found := self._find(index, name)) is None:
            return multiple()
        bitmap, model = found
        if self._refused(model, lambda: bitmap.pin("export")):
            return multiple()
        pin = bitmap.pin("export")
        model.use = "pinned"
        return Used(self.models[index], model, pin)

    @rule(target=spent, used=consumes(pins))
    def release(self, used: Used) -> Used:
        assert isinstance(used.token, Pin)
        used.token.release()
        used.model.use = "free"
        return used

    @rule(used=spent)
    def use_a_token_again(self, used: Used) -> None:
        token = used.token
        ends = [token.release] if isinstance(token, Pin) else [token.reclaim, token.abdicate]
        for end in ends:
            with pytest.raises(RuntimeError, match="has ended"):
                end()

    @rule(index=NODES, name=NAMES)
    def freeze_and_reclaim_changes_nothing(self, index: int, name: str) -> None:
        if (found := self._find(index, name)) is None:
            return
        bitmap, model = found
        if model.use == "free":
            before = self.nodes[index].infos(), bitmap.copy_bits().digest(), type(bitmap.state)
            bitmap.freeze("job").reclaim()
            self.models[index].next_rank()
            assert (
                self.nodes[index].infos(),
                bitmap.copy_bits().digest(),
                type(bitmap.state),
            ) == before

    # -- what holds --------------------------------------------------------------------------

    @invariant()
    def who_records_is_known(self) -> None:
        """Asked after each step, so it must not fold the recent writes."""
        for index, (node, model) in enumerate(zip(self.nodes, self.models, strict=True)):
            recording = any(bitmap.recording for bitmap in model.bitmaps.values())
            assert node.any_recording == recording == self.told[index]

    @rule(index=NODES)
    def compare(self, index: int) -> None:
        node, model = self.nodes[index], self.models[index]
        assert {bitmap.name for bitmap in node.list()} == set(model.bitmaps)
        for name, expected in model.bitmaps.items():
            self._compare_bitmap(node.get(name), expected)
        shown = [(info.name, info.count_bytes, info.recording, info.busy) for info in node.infos()]
        assert shown == list(self._expected_listing(model))
        names = [info.name for info in node.infos() if info.name is not None]
        assert len(names) == len(set(names))

    def _compare_bitmap(self, bitmap: DirtyBitmap, expected: Model) -> None:
        assert kind(bitmap.state) == (expected.use, expected.recording)
        assert (bitmap.busy, bitmap.recording) == (expected.use != "free", expected.recording)
        named, successor = bits_of(bitmap.state)
        assert (named, successor) == (expected.named, expected.successor)
        assert bitmap.count_bytes == len(named) * expected.granularity
        assert expected.touched(expected.changed) <= named | successor, "a change got lost"

    def _expected_listing(self, model: NodeModel) -> Iterator[tuple[str | None, int, bool, bool]]:
        entries: list[tuple[int, tuple[str | None, int, bool, bool]]] = []
        for name, each in model.bitmaps.items():
            count, busy = len(each.named) * each.granularity, each.use != "free"
            entries.append((each.rank, (name, count, each.recording, busy)))
            if each.use == "frozen":
                count = len(each.successor) * each.granularity
                entries.append((each.successor_rank, (None, count, each.recording, False)))
        return (entry for _, entry in sorted(entries, reverse=True))

    def teardown(self) -> None:
        for index in range(len(getattr(self, "nodes", ()))):
            self.compare(index)


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Windows so small that runs go over their borders."""
    with mock.patch.object(limits, "BITMAP_WINDOW_GRANULES", 64):
        yield


Bitmaps.TestCase.settings = settings(
    max_examples=1000,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
)
TestBitmaps = Bitmaps.TestCase
