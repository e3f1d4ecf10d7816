"""What the state directory keeps of an image and its bitmaps, and the form in which it does."""

from __future__ import annotations

import struct
import zlib
from typing import TypeVar

import msgspec

from blockd import limits
from blockd.bitmap import Reason

_SUM = struct.Struct("<I")


class DamagedError(Exception):
    """What is stored is not what was."""


class Identity(msgspec.Struct, frozen=True):
    """What the host says of the file or device that an image is in.

    ``serial``: the device's own name, where it has one; a file has none. The times are 0 for a
    device, which has none of use.
    """

    device: int
    inode: int
    serial: str = ""
    size_bytes: int = 0
    changed_ns: int = 0
    inode_changed_ns: int = 0

    def same_storage(self, other: Identity, *, same_boot: bool) -> bool:
        """Whether it is the same file or device, changed or not.

        Devices' numbers, those that file systems are on too, may be others after a boot.
        """
        if self.serial or other.serial or self.device < 0 or other.device < 0:
            return (self.serial, self.device < 0) == (other.serial, other.device < 0)
        return self.inode == other.inode and (self.device == other.device or not same_boot)

    def same_times(self, other: Identity) -> bool:
        """Whether neither content nor anything else of it has changed."""
        ours = (self.size_bytes, self.changed_ns, self.inode_changed_ns)
        return ours == (other.size_bytes, other.changed_ns, other.inode_changed_ns)

    def surely_same_storage(self, other: Identity) -> bool:
        """Whether it is so without a look at where it is: a device without a name may be any."""
        known = self.device >= 0 or self.serial != ""
        return known and self.same_storage(other, same_boot=True)


class Sighting(msgspec.Struct, frozen=True):
    """The times of an image as they were when it was looked at, not before ``seen_ns``."""

    seen_ns: int
    changed_ns: int
    inode_changed_ns: int

    @classmethod
    def of(cls, identity: Identity, seen_ns: int) -> Sighting:
        return cls(seen_ns, identity.changed_ns, identity.inode_changed_ns)


class PieceRef(msgspec.Struct, frozen=True, array_like=True):
    """A stored piece: the window, its row, the sum within it, and how many granules it has."""

    window: int
    row: int
    sum: int
    count: int


class BitmapTitle(msgspec.Struct, frozen=True):
    """What says which bitmaps there are, where all else of them is lost."""

    row: int
    name: str
    granularity_bytes: int
    recording: bool
    #: As ``DirtyBitmap.identity``; one that is ``coming`` has none yet.
    identity: str | None = None
    #: There is none of the name yet, unless the image came to harm: then nobody knows.
    coming: bool = False


class BitmapRecord(msgspec.Struct, frozen=True):
    """A stored bitmap: ``pieces``, and the marks of all epochs from ``epoch`` on if recording."""

    title: BitmapTitle
    rank: int
    epoch: int
    pieces: tuple[PieceRef, ...]
    reason: Reason | None = None


class ImageRecord(msgspec.Struct, frozen=True):
    """A stored image, found again by ``key``.

    ``open``: it may have been written to since ``identity`` was taken in the boot ``boot_id``;
    armed regions, and the marks of the epochs from ``since`` to ``epoch``, tell where. Else it
    was closed cleanly, as ``identity`` has it. ``left_ns``: the latest time that the daemon which
    had it open may have given it; None while one has it, so far as is known. ``seen``: how that
    daemon saw it last, where the machine has not been started again since. ``settled_ns``: no
    change of ours has given its inode an earlier time than this one, which is durable.
    ``largest_bytes``: as ``NodeBitmaps`` has it.
    """

    row: int
    key: str
    identity: Identity
    size_bytes: int
    open: bool
    boot_id: str
    since: int
    epoch: int
    bitmaps: tuple[BitmapTitle, ...]
    left_ns: int | None = None
    seen: Sighting | None = None
    settled_ns: int = 0
    damaged: bool = False
    largest_bytes: int = 0


class ArmedRow(msgspec.Struct, frozen=True):
    """Regions of ``1 << shift`` bytes that may be written to in ``epoch`` or later, in the
    library's portable form.
    """

    epoch: int
    shift: int
    regions: bytes


class JobRecord(msgspec.Struct, frozen=True):
    """What is to be known of a job that is under way."""

    facts: dict[str, str]


_Record = TypeVar("_Record")


def seal(record: msgspec.Struct) -> bytes:
    """The record behind a sum that shows damage."""
    data = msgspec.json.encode(record)
    return _SUM.pack(zlib.crc32(data)) + data


def unseal(sealed: object, kind: type[_Record]) -> _Record:
    """The record that ``seal`` was given. Raises ``DamagedError``."""
    # Damage can make anything of a column.
    if not isinstance(sealed, bytes) or sealed[: _SUM.size] != _SUM.pack(
        zlib.crc32(sealed[_SUM.size :])
    ):
        raise DamagedError("a record is damaged")
    try:
        return msgspec.json.decode(sealed[_SUM.size :], type=kind)
    except msgspec.MsgspecError as error:
        raise DamagedError(f"a record is damaged: {error}") from error


def region_shift(size_bytes: int) -> int:
    """log2 of the bytes that are armed at a time, in an image of such a size."""
    return max(limits.STATE_REGION_BYTES.bit_length() - 1, _coarse_shift(size_bytes))


def mark_shift(size_bytes: int, granularity_bytes: int) -> int:
    """log2 of the bytes for each mark: fine enough for such bitmaps, coarse enough for the file.

    Never more than a region's, so that what is marked is armed.
    """
    fine = min(granularity_bytes.bit_length() - 1, region_shift(size_bytes))
    return max(fine, _coarse_shift(size_bytes))


def _coarse_shift(size_bytes: int) -> int:
    """The least with which an image's marks fit into their file."""
    marks = limits.STATE_MARKS_BYTES * 8
    return (
        max(size_bytes - 1, 0).bit_length() - (marks.bit_length() - 1) if size_bytes > marks else 0
    )


def mark_bytes(size_bytes: int, shift: int) -> int:
    """How many bytes the marks of an image take."""
    granules = (size_bytes + (1 << shift) - 1) >> shift
    return (granules + 7) // 8
