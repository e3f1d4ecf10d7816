"""Reading back what a state directory has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import msgspec
import trio

from blockd import limits
from blockd.bitmap import Bits, DirtyBitmap, Recording, Stopped
from blockd.block import Node
from blockd.state import changes, marks
from blockd.state.commits import Commits, Pending
from blockd.state.database import Database, Details, ImageRow
from blockd.state.disk import Disk
from blockd.state.records import (
    ArmedRow,
    BitmapRecord,
    DamagedError,
    ImageRecord,
    JobRecord,
    PieceRef,
    unseal,
)
from blockd.state.recovery import Circumstances, Recovered, Recovery, Stored, add_pieces, recover

_log = logging.getLogger(__name__)


def load_images(rows: Iterable[ImageRow], disk: Disk) -> dict[int, ImageRecord]:
    """All images, by row. One whose record is lost or damaged is what its marks file says it was.

    Raises ``OSError`` where not even the names of the files can be read.
    """
    images: dict[int, ImageRecord] = {}
    for row in rows:
        try:
            images[row.row] = unseal(row.body, ImageRecord)
        except DamagedError:
            _log.error("the record of image %d is damaged", row.row)
    for image_row, image in _titled(disk).items():
        if image_row in images:
            continue
        if image.bitmaps:
            _log.error("'%s': the record is lost, so its bitmaps will be all dirty", image.key)
            images[image_row] = msgspec.structs.replace(image, damaged=True)
        else:
            # It was forgotten, and the daemon killed right then.
            marks.delete(disk, image_row)
    return images


def load_jobs(database: Database) -> list[tuple[str, Mapping[str, str]]]:
    jobs: list[tuple[str, Mapping[str, str]]] = []
    for job_id, body in database.jobs():
        try:
            jobs.append((job_id, unseal(body, JobRecord).facts))
        except DamagedError:
            jobs.append((job_id, {}))
    return jobs


def _titled(disk: Disk) -> dict[int, ImageRecord]:
    """The images as their latest marks files have them."""
    epochs: dict[int, list[int]] = {}
    for name in disk.names():
        if parsed := marks.parse_name(name):
            epochs.setdefault(parsed[0], []).append(parsed[1])
    found = {}
    for image_row, numbers in epochs.items():
        for epoch in sorted(numbers, reverse=True):
            try:
                header = marks.read_header(disk, marks.marks_name(image_row, epoch))
            except (OSError, DamagedError):
                continue
            found[image_row] = header.image
            break
    return found


async def recover_image(
    image: ImageRecord, now: Circumstances, commits: Commits, disk: Disk
) -> Recovery:
    """Read all that is kept of an image, and make its bitmaps of it. Never raises ``OSError``.

    Others commit in between.
    """
    bitmaps: dict[int, tuple[BitmapRecord, Bits]] = {}
    armed: Sequence[ArmedRow] | None = None
    try:
        records, armed = await commits.read(partial(_read_details, image_row=image.row))
    except OSError as error:
        _log.error("'%s': its bitmaps can't be read: %s", image.key, error)
        records = []
    for record in records:
        bits = await _read_bitmap(record, now.size_bytes, commits)
        if bits is not None:
            bitmaps[record.title.row] = record, bits
    found = await trio.to_thread.run_sync(_read_marks, disk, image.row)
    stored = Stored(image, bitmaps, armed, found)
    return await trio.to_thread.run_sync(recover, stored, now)


def _read_details(
    database: Database, image_row: int
) -> tuple[list[BitmapRecord], Sequence[ArmedRow] | None]:
    details = database.details(image_row)
    return _records(details), _armed(details)


def _records(details: Details) -> list[BitmapRecord]:
    records = []
    for row, body in details.bitmaps:
        try:
            record = unseal(body, BitmapRecord)
        except DamagedError:
            continue
        if record.title.row == row:
            records.append(record)
    return records


def _armed(details: Details) -> Sequence[ArmedRow] | None:
    if len(details.armed) != details.armed_rows:
        return None
    try:
        return [unseal(body, ArmedRow) for _, body in details.armed]
    except DamagedError:
        return None


async def delete_unused_pieces(commits: Commits, last: int) -> None:
    """Delete those that the daemon before this one had no time to make part of a bitmap."""
    with suppress(OSError):
        unused = await commits.read(partial(unused_pieces, last=last))
        for at in range(0, len(unused), limits.STATE_DELETE_PIECES):
            rows = unused[at : at + limits.STATE_DELETE_PIECES]
            await commits.commit(Pending(changes.delete_pieces(rows)))


def unused_pieces(database: Database, last: int) -> Sequence[int]:
    """The rows of pieces that belong to no bitmap, up to ``last``: later ones are on their way."""
    used: set[int] = set()
    for body in database.bitmaps():
        with suppress(DamagedError):
            used.update(ref.row for ref in unseal(body, BitmapRecord).pieces)
    return [row for row in database.piece_rows() if row <= last and row not in used]


async def _read_bitmap(record: BitmapRecord, size_bytes: int, commits: Commits) -> Bits | None:
    bits = Bits(size_bytes, record.title.granularity_bytes)

    def read(database: Database, refs: Sequence[PieceRef]) -> bool:
        return add_pieces(bits, refs, database.pieces([ref.row for ref in refs]))

    try:
        for at in range(0, len(record.pieces), limits.STATE_READ_PIECES):
            refs = record.pieces[at : at + limits.STATE_READ_PIECES]
            if not await commits.read(partial(read, refs=refs)):
                return None
    except OSError as error:
        _log.error("bitmap '%s' can't be read: %s", record.title.name, error)
        return None
    return bits


def _read_marks(disk: Disk, image_row: int) -> Mapping[int, marks.Marks | None]:
    found: dict[int, marks.Marks | None] = {}
    try:
        names = disk.names()
    except OSError:
        return found
    for name in names:
        parsed = marks.parse_name(name)
        if parsed is not None and parsed[0] == image_row:
            try:
                found[parsed[1]] = marks.read(disk, name)
            except (OSError, DamagedError) as error:
                _log.error("the marks file '%s' can't be read: %s", name, error)
                found[parsed[1]] = None
    return found


def put_in(node: Node, found: Recovered, *, is_another: bool) -> DirtyBitmap | None:
    """Put a recovered bitmap into the node; None where the node has a better one.

    ``is_another``: the image, so that its own ones are no better.
    """
    name = found.title.name
    if node.bitmaps.has(name):
        there = node.bitmaps.get(name)
        if not there.inconsistent and not is_another:
            if found.reason is None:
                there.identity = found.title.identity or there.identity
            return None
        # It is not the image that is changed.
        there.read_only = False
        node.bitmaps.remove(name)
    state = Recording(found.bits) if found.title.recording else Stopped(found.bits)
    bitmap = node.bitmaps.add_kept(name, state, read_only=False)
    bitmap.reason, bitmap.identity = found.reason, found.title.identity or bitmap.identity
    return bitmap
