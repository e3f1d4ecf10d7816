"""The dirty bitmaps of one node, and its record of recent writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from blockd import limits
from blockd.bitmap.bitmap import DirtyBitmap
from blockd.bitmap.bits import Bits
from blockd.bitmap.reason import Reason
from blockd.bitmap.states import Frozen, Inconsistent, Recording, Stopped, idle
from blockd.errors import BlockdError


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """What a query shows of a bitmap (``BlockDirtyInfo``); ``name`` is None for a successor."""

    name: str | None
    count_bytes: int
    granularity_bytes: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False
    reason: Reason | None = None


def default_granularity_bytes(cluster_size_bytes: int | None) -> int:
    """The granularity of a bitmap for which none is asked, on a node with such clusters."""
    if cluster_size_bytes is None:
        return limits.BITMAP_DEFAULT_GRANULARITY_MAX_BYTES
    return min(
        max(cluster_size_bytes, limits.BITMAP_DEFAULT_GRANULARITY_MIN_BYTES),
        limits.BITMAP_DEFAULT_GRANULARITY_MAX_BYTES,
    )


class NodeBitmaps:
    """The bitmaps of a node of ``size_bytes``, each known by its name.

    The write path appends (offset, length) to ``recent`` before the data can reach the disk, and
    calls ``fold`` when there are ``RECENT_WRITES_LIMIT`` of them. Everything that reads or
    changes a bitmap folds first, so nobody else needs to think of it. The list object stays the
    same one; a write that is appended lies within the node, and has at least one byte.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        #: How large the node has ever been: beyond its present end, nothing is as a backup has it.
        self.largest_bytes = size_bytes
        self._bitmaps: dict[str, DirtyBitmap] = {}
        self._ranks = count()
        self.recent: list[tuple[int, int]] = []
        #: Whether any bitmap marks guest writes now, so that they must be put into ``recent``.
        self.any_recording = False
        #: Called at once after ``any_recording`` changed. It must not raise.
        self.on_change: Callable[[], None] = _nothing

    def add(self, name: str, granularity_bytes: int, *, disabled: bool = False) -> DirtyBitmap:
        """Make a bitmap with nothing marked.

        Raises ``BlockdError`` for a name that is empty, too long or taken, and for a granularity
        that is no power of two, or out of range.
        """
        self.check_new(name, granularity_bytes)
        bits = Bits(self._size_bytes, granularity_bytes)
        return self._put(name, idle(bits, recording=not disabled))

    def add_kept(
        self, name: str, state: Recording | Stopped | Inconsistent, *, read_only: bool
    ) -> DirtyBitmap:
        """Put in a bitmap that outlived an earlier node; its bits are given away with the call.

        Raises ``BlockdError`` where it can't be one.
        """
        self.check_new(name, state.bits.granularity_bytes)
        bitmap = self._put(name, state)
        bitmap.persistent, bitmap.read_only = True, read_only
        if isinstance(state, Inconsistent):
            bitmap.reason = Reason.CRASH_UNRECOVERABLE
        return bitmap

    def _put(self, name: str, state: Recording | Stopped | Inconsistent) -> DirtyBitmap:
        self.fold()
        bitmap = DirtyBitmap(self, name, state)
        self._bitmaps[name] = bitmap
        self.recording_changed()
        return bitmap

    @staticmethod
    def check_form(name: str, granularity_bytes: int) -> None:
        """What ``check_new`` checks first, before whoever is to keep the bitmap is asked."""
        _check_granularity_type(granularity_bytes)
        if not name:
            raise BlockdError("Bitmap name cannot be empty")
        check_granularity(granularity_bytes)

    def check_new(self, name: str, granularity_bytes: int) -> None:
        """Raise the ``BlockdError`` with which ``add`` would refuse these."""
        self.check_form(name, granularity_bytes)
        if len(name.encode()) > limits.BITMAP_NAME_BYTES:
            raise BlockdError(f"Bitmap name too long: {name}")
        if name in self._bitmaps:
            raise BlockdError(f"Bitmap already exists: {name}")

    def remove(self, name: str) -> None:
        """Forget a bitmap; ``BlockdError`` where it does not exist, is in use or read-only."""
        self.get(name).check_removable()
        del self._bitmaps[name]
        self.recording_changed()

    def get(self, name: str) -> DirtyBitmap:
        """The bitmap of that name; ``BlockdError`` where there is none."""
        bitmap = self._bitmaps.get(name)
        if bitmap is None:
            raise BlockdError(f"Dirty bitmap '{name}' not found")
        return bitmap

    def has(self, name: str) -> bool:
        """Whether there is a bitmap of that name."""
        return name in self._bitmaps

    def list(self) -> tuple[DirtyBitmap, ...]:
        """All bitmaps, the newest first."""
        return tuple(sorted(self._bitmaps.values(), key=lambda bitmap: -bitmap.rank))

    def kept(self) -> Sequence[DirtyBitmap]:
        """Those that are to outlive the node, in any order, for there may be very many."""
        return [bitmap for bitmap in self._bitmaps.values() if bitmap.persistent]

    def infos(self) -> tuple[BitmapInfo, ...]:
        """What a query shows: the newest first, a successor being as new as its freeze."""
        ranked = [entry for bitmap in self._bitmaps.values() for entry in _ranked_infos(bitmap)]
        ranked.sort(key=lambda entry: -entry[0])
        return tuple(info for _, info in ranked)

    def resize(self, size_bytes: int) -> None:
        """Follow the node to a new size, in every bitmap whatever its state.

        As with QEMU, marks past the new end go and what is added is clean. But what was cut
        off before and now comes back has changed, and is marked: QEMU would lose that.
        """
        old_bytes, self._size_bytes = self._size_bytes, size_bytes
        for bitmap in self._bitmaps.values():
            bitmap.resize(size_bytes)
        for bits in self._recorders():
            bits.mark(old_bytes, min(size_bytes, self.largest_bytes) - old_bytes)
        self.largest_bytes = max(self.largest_bytes, size_bytes)

    def fold(self) -> None:
        """Move the recent writes into every bitmap that records, as they are now.

        Writes are worked out once for each granularity, then marked in each bitmap.
        """
        if not self.recent:
            return
        groups: dict[int, list[Bits]] = {}
        for bits in self._recorders():
            groups.setdefault(bits.granularity_bytes, []).append(bits)
        for granularity_bytes, group in groups.items():
            firsts, runs = _touched(self.recent, granularity_bytes)
            for bits in group:
                bits.update_granules(firsts)
                bits.update_runs(runs)
        self.recent.clear()

    def recording_changed(self) -> None:
        """A bitmap may have begun or ceased to record; for the bitmaps themselves."""
        any_recording = next(self._recorders(), None) is not None
        if any_recording != self.any_recording:
            self.any_recording = any_recording
            self.on_change()

    def next_rank(self) -> int:
        """A place in the listing, newer than all given so far; for the bitmaps themselves."""
        return next(self._ranks)

    def _recorders(self) -> Iterator[Bits]:
        for bitmap in self._bitmaps.values():
            bits = bitmap.recording_bits
            if bits is not None:
                yield bits


def _nothing() -> None:
    pass


def _check_granularity_type(granularity_bytes: int) -> None:
    # QEMU finds this among the types of the arguments, before any of them is looked at.
    if not 0 <= granularity_bytes < 1 << 32:
        raise BlockdError("Parameter 'granularity' expects uint32_t")


def check_granularity(granularity_bytes: int) -> None:
    """Raise ``BlockdError`` unless a bitmap may have it: a power of two in its range."""
    if granularity_bytes.bit_count() != 1 or not (
        limits.BITMAP_GRANULARITY_MIN_BYTES
        <= granularity_bytes
        <= limits.BITMAP_GRANULARITY_MAX_BYTES
    ):
        raise BlockdError("Granularity must be power of 2 and at least 512")


def _touched(
    writes: Sequence[tuple[int, int]], granularity_bytes: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """The first granule of each write, and the whole run for those that touch more than one."""
    shift = granularity_bytes.bit_length() - 1
    within = granularity_bytes - 1
    firsts = [offset >> shift for offset, _ in writes]
    runs = [
        (offset >> shift, ((offset + length - 1) >> shift) + 1)
        for offset, length in writes
        if (offset & within) + length > granularity_bytes
    ]
    return firsts, runs


def _ranked_infos(bitmap: DirtyBitmap) -> Iterator[tuple[int, BitmapInfo]]:
    state = bitmap.state
    yield (
        bitmap.rank,
        BitmapInfo(
            name=bitmap.name,
            count_bytes=bitmap.count_bytes,
            granularity_bytes=bitmap.granularity_bytes,
            recording=bitmap.recording,
            busy=bitmap.busy,
            persistent=bitmap.persistent,
            inconsistent=bitmap.inconsistent,
            reason=bitmap.reason,
        ),
    )
    if isinstance(state, Frozen):
        yield (
            state.successor_rank,
            BitmapInfo(
                name=None,
                count_bytes=state.successor.count_bytes,
                granularity_bytes=state.successor.granularity_bytes,
                recording=state.recording,
                busy=False,
                persistent=False,
            ),
        )
