"""What becomes of stored bitmaps when their image is opened again: a function of what is found.

    closed cleanly, and the same as then      the stored bits
    open, in this boot                        with the marks of all epochs since they were stored
    open, before this boot                    with the armed regions
    written to, or replaced, by others        all dirty: image-changed
    another size                              all dirty: size-changed
    something kept of it is damaged           all dirty: state-damaged

Bits only err to dirty. Disabled bitmaps take no marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from pyroaring import BitMap64

from blockd import limits
from blockd.bitmap import Bits, DamagedPieceError, Reason, piece_sum, unpack_piece
from blockd.state.host import Boot
from blockd.state.marks import Marks
from blockd.state.records import (
    ArmedRow,
    BitmapRecord,
    BitmapTitle,
    Identity,
    ImageRecord,
    PieceRef,
    Sighting,
)

_NS = 10**9
#: As many as a processor's own cache takes (1 MiB).
_PIECES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Circumstances:
    """How the image is found; ``moved``: by its identity, at another place than it was."""

    identity: Identity
    size_bytes: int
    moved: bool
    boot_id: str


@dataclass(frozen=True, slots=True)
class Stored:
    """All that is kept of an image, as far as it can be read.

    ``bitmaps``: by the row in their titles, with the bits of their pieces, which are given away;
    those that are damaged are not there. ``armed`` None: not all rows are there. ``marks``: by
    epoch; a file that is damaged is None, one that is not there is not.
    """

    image: ImageRecord
    bitmaps: Mapping[int, tuple[BitmapRecord, Bits]]
    armed: Sequence[ArmedRow] | None
    marks: Mapping[int, Marks | None]


@dataclass(frozen=True, slots=True)
class Recovered:
    """One bitmap; ``record`` is what its pieces are stored as, None where they are of no use."""

    title: BitmapTitle
    rank: int
    bits: Bits
    reason: Reason | None
    record: BitmapRecord | None


@dataclass(frozen=True, slots=True)
class Recovery:
    """``as_stored``: nothing has to be stored anew before the image may be written to."""

    bitmaps: Sequence[Recovered]
    as_stored: bool


def recover(stored: Stored, now: Circumstances) -> Recovery:
    """The bitmaps as they are to be, the oldest first."""
    reason = judge_image(stored.image, now) or _judge_state(stored, now.boot_id)
    touched = None if reason else _touched(stored, now)
    if reason is None and stored.image.open and touched is None:
        reason = Reason.STATE_DAMAGED
    # One that was coming could be stored when it had been added, or else that was recorded.
    titles = [title for title in stored.image.bitmaps if reason is not None or not title.coming]
    bitmaps = [_recover_bitmap(stored, title, now, reason, touched) for title in titles]
    bitmaps.sort(key=lambda bitmap: bitmap.rank)
    return Recovery(bitmaps, all(each.record is not None for each in bitmaps))


def judge_image(image: ImageRecord, now: Circumstances) -> Reason | None:
    """Why what is stored is not to be trusted for the image as it is found; None: it is."""
    same_boot = image.boot_id == now.boot_id
    if image.size_bytes != now.size_bytes:
        return Reason.SIZE_CHANGED
    if not image.identity.same_storage(now.identity, same_boot=same_boot):
        return Reason.IMAGE_CHANGED
    if image.open:
        changed = _changed_since(image, now, same_boot=same_boot)
    else:
        changed = _differs(image.identity, now)
    return Reason.IMAGE_CHANGED if changed else None


def is_another(image: ImageRecord, identity: Identity, boot: Boot) -> bool:
    """Whether the file is not the one that was there, or is as it was before that.

    Then not even what it says of itself is to be believed. Nor where it was open: we left it with
    bitmaps that are in use, and QEMU leaves them so.
    """
    same_boot = image.boot_id == boot.boot_id
    older = identity.changed_ns < image.identity.changed_ns
    return image.open or older or not image.identity.same_storage(identity, same_boot=same_boot)


def untouched(image: ImageRecord, identity: Identity, boot: Boot) -> bool:
    """Whether an image that was open has been left alone since, as far as its host can tell."""
    same_boot = image.boot_id == boot.boot_id
    now = Circumstances(
        identity=identity,
        size_bytes=image.size_bytes,
        moved=False,
        boot_id=boot.boot_id,
    )
    return image.identity.same_storage(identity, same_boot=same_boot) and not _changed_since(
        image, now, same_boot=same_boot
    )


def _differs(then: Identity, now: Circumstances) -> bool:
    """Whether an image that was closed cleanly is another; to be moved is to change the inode."""
    if (then.size_bytes, then.changed_ns) != (now.identity.size_bytes, now.identity.changed_ns):
        return True
    return not now.moved and then.inode_changed_ns != now.identity.inode_changed_ns


def left(image: ImageRecord, boot: Boot, last_ns: int, seen: Sighting | None) -> ImageRecord:
    """The record of an image that a daemon had open which is no more: until when it had it.

    ``last_ns``: when that one was last alive; ``seen``: how it saw the image last; both as far as
    they are known. After a power cut they may be of some time before the last they were noted.
    """
    if image.boot_id != boot.boot_id:
        late_ns = limits.STATE_HEARTBEAT_CUT_SECONDS * _NS
        left_ns = min(last_ns + late_ns, boot.time_ns)
        return msgspec.structs.replace(image, left_ns=left_ns, seen=None)
    seen = seen or Sighting.of(image.identity, last_ns)
    left_ns = last_ns + limits.STATE_HEARTBEAT_LATE_SECONDS * _NS
    return msgspec.structs.replace(image, left_ns=left_ns, seen=seen)


def _changed_since(image: ImageRecord, now: Circumstances, *, same_boot: bool) -> bool:
    """Whether an image that was open was written to after our daemon had gone.

    What was copied over it may have brought an old time along, but not for the inode; and to be
    moved is to change the inode.
    """
    if image.left_ns is None:
        return True
    identity = now.identity
    if not same_boot or image.seen is None:
        # A power cut may have taken back any change that was not settled.
        early = identity.inode_changed_ns < image.settled_ns
        latest = max(identity.changed_ns, 0 if now.moved else identity.inode_changed_ns)
        return early or latest > image.left_ns
    earliest = image.seen.seen_ns - limits.STATE_HEARTBEAT_LATE_SECONDS * _NS
    times = [(identity.changed_ns, image.seen.changed_ns)]
    if not now.moved:
        times.append((identity.inode_changed_ns, image.seen.inode_changed_ns))
    return not all(time == seen or earliest <= time <= image.left_ns for time, seen in times)


def _judge_state(stored: Stored, boot_id: str) -> Reason | None:
    """Whether what must be there of the image as a whole is there, and sound."""
    image = stored.image
    if image.damaged:
        return Reason.STATE_DAMAGED
    for epoch in _needed(stored):
        marks = stored.marks.get(epoch)
        if marks is None or marks.poisoned:
            return Reason.STATE_DAMAGED
        if image.open and marks.marks is None and marks.header.boot_id == boot_id:
            return Reason.STATE_DAMAGED
    for epoch, marks in stored.marks.items():
        # Nothing is marked before the record says that the epoch has begun.
        if epoch > image.epoch and marks is not None and (marks.poisoned or marks.any):
            return Reason.STATE_DAMAGED
    return None


def _needed(stored: Stored) -> range:
    """The epochs whose marks files must be there."""
    image = stored.image
    if not image.open:
        return range(image.epoch, image.epoch + 1)
    since = min((record.epoch for record, _ in stored.bitmaps.values()), default=image.epoch)
    return range(max(since, image.since), image.epoch + 1)


@dataclass(frozen=True, slots=True)
class _Touched:
    """What was written to while the image was open, by epoch.

    ``armed``: of the epochs up to ``exact_after``, which were before this boot; regions that were
    armed later are not needed, since the marks of these epochs are all there.
    """

    marks: Mapping[int, Bits]
    armed: Sequence[tuple[int, Bits]] = ()
    exact_after: int = -1

    def add_to(self, bits: Bits, epoch: int) -> None:
        for marked_in, marked in self.marks.items():
            if marked_in >= epoch:
                bits.merge(marked)
        for armed_in, regions in self.armed:
            if epoch <= armed_in <= self.exact_after:
                bits.merge(regions)


def _touched(stored: Stored, now: Circumstances) -> _Touched | None:
    """None where it is not known."""
    image = stored.image
    if not image.open:
        return _Touched({})
    marks = {
        epoch: found
        for epoch, found in stored.marks.items()
        if found is not None and found.header.boot_id == now.boot_id and epoch >= image.since
    }
    marked = {epoch: _marked(found, now.size_bytes) for epoch, found in marks.items()}
    exact_after = max((epoch for epoch in _needed(stored) if epoch not in marks), default=-1)
    if exact_after < 0:
        return _Touched(marked)
    if stored.armed is None:
        return None
    return _Touched(marked, _armed(stored.armed, now.size_bytes), exact_after)


def _armed(rows: Sequence[ArmedRow], size_bytes: int) -> Sequence[tuple[int, Bits]]:
    """The regions of each epoch."""
    armed: dict[tuple[int, int], Bits] = {}
    for row in rows:
        bits = armed.setdefault((row.epoch, row.shift), Bits(size_bytes, 1 << row.shift))
        bits.add_granules(BitMap64.deserialize(row.regions))
    return [(epoch, bits) for (epoch, _), bits in armed.items()]


def _marked(marks: Marks, size_bytes: int) -> Bits:
    bits = Bits(size_bytes, 1 << marks.header.shift)
    bits.add_packed(0, marks.marks or b"")
    return bits


def _recover_bitmap(
    stored: Stored,
    title: BitmapTitle,
    now: Circumstances,
    reason: Reason | None,
    touched: _Touched | None,
) -> Recovered:
    found = stored.bitmaps.get(title.row)
    rank = title.row if found is None else found[0].rank
    if reason is None and found is not None and touched is not None:
        record, bits = found
        if record.title.recording:
            touched.add_to(bits, record.epoch)
        return Recovered(title, rank, bits, record.reason, record)
    if reason is Reason.STATE_DAMAGED:
        # It may be that it was enabled that could not be recorded.
        title = msgspec.structs.replace(title, recording=True)
    bits = Bits(now.size_bytes, title.granularity_bytes)
    bits.mark_all()
    return Recovered(title, rank, bits, reason or Reason.STATE_DAMAGED, None)


def add_pieces(bits: Bits, refs: Sequence[PieceRef], pieces: Iterable[object]) -> bool:
    """Mark what the pieces of ``refs``, in their order, tell; false where one is damaged."""
    part = BitMap64()
    for number, (ref, piece) in enumerate(zip(refs, pieces, strict=True), start=1):
        # Damage can make anything of a column.
        if not isinstance(piece, bytes):
            return False
        try:
            granules = unpack_piece(ref.window, piece)
        except DamagedPieceError:
            return False
        if piece_sum(piece) != ref.sum or len(granules) != ref.count:
            return False
        part |= granules
        # A union takes time in proportion to both, so that few are made with all there is.
        if number % _PIECES_AT_ONCE == 0:
            bits.add_granules(part)
            part = BitMap64()
    bits.add_granules(part)
    return True
