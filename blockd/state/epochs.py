"""Making an image's epochs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import trio

from blockd.block import Node
from blockd.errors import BlockdError
from blockd.state import changes, marks
from blockd.state.commits import Pending
from blockd.state.environment import Environment
from blockd.state.epoch import Epoch
from blockd.state.places import Place, find_place, identify
from blockd.state.records import (
    BitmapTitle,
    Identity,
    ImageRecord,
    Sighting,
    mark_bytes,
    mark_shift,
)


async def make_epoch(
    environment: Environment,
    node: Node,
    record: ImageRecord,
    titles: Sequence[BitmapTitle],
    *,
    commit: bool,
) -> tuple[Epoch, ImageRecord]:
    """The epoch after the record's last, with its file; it is recorded where ``commit``.

    The result has the image's record as that of one which may be written to. Raises ``OSError``.
    The instant at which the epoch begins must follow without a wait.
    """
    if not record.epoch:
        # Whoever finds the file later must find the image, too.
        await environment.commits.commit(Pending(changes.put_image(record)))
    opened = await _opened(record, node, environment)
    header = _header(opened, node.size_bytes, titles)
    disk = environment.disk
    epoch = Epoch(disk, await trio.to_thread.run_sync(marks.create, disk, header))
    try:
        if commit:
            await environment.commits.commit(Pending(changes.put_image(opened)))
    except BaseException:
        await end_epoch(epoch)
        raise
    return epoch, opened


async def end_epoch(epoch: Epoch | None) -> None:
    """Let go of one that has ended, if there is one."""

    def end() -> None:
        if epoch is not None:
            with suppress(OSError):
                epoch.end()

    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(end)


async def _opened(record: ImageRecord, node: Node, environment: Environment) -> ImageRecord:
    number, heartbeat = record.epoch + 1, environment.heartbeat
    if not record.open or record.left_ns is not None:
        # Nobody may have noted for long that a daemon is alive.
        heartbeat.beat()
        with suppress(OSError):
            await trio.to_thread.run_sync(heartbeat.sync)
    seen_ns = heartbeat.clock()
    place, identity = await look_at(node)
    heartbeat.saw(record.row, Sighting.of(identity, seen_ns))
    return msgspec.structs.replace(
        record,
        key=place.key,
        identity=identity,
        open=True,
        boot_id=environment.boot_id,
        since=record.since if record.open else number,
        epoch=number,
        left_ns=None,
        seen=None,
        settled_ns=min(record.settled_ns, identity.inode_changed_ns),
        damaged=False,
        largest_bytes=node.bitmaps.largest_bytes,
    )


def _header(
    record: ImageRecord, size_bytes: int, titles: Sequence[BitmapTitle]
) -> marks.MarksHeader:
    finest = min((title.granularity_bytes for title in titles), default=1 << 63)
    shift = mark_shift(size_bytes, finest)
    return marks.MarksHeader(
        msgspec.structs.replace(record, size_bytes=size_bytes, bitmaps=tuple(titles)),
        record.epoch,
        record.boot_id,
        shift,
        mark_bytes(size_bytes, shift),
    )


def hold_place(node: Node) -> tuple[Place, int]:
    """Where the image is, and a descriptor of it that stays, with its locks.

    The node may be opened anew meanwhile, with another descriptor. Raises ``OSError``.
    """
    try:
        place = find_place(node)
    except BlockdError as error:
        raise OSError(errno.ENODEV, error.message) from error
    return place, os.dup(place.fd)


async def look_at(node: Node) -> tuple[Place, Identity]:
    """Where the image is, and how. Raises ``OSError``."""
    place, fd = hold_place(node)
    # The descriptor is closed there, and would keep the image locked for ever.
    with trio.CancelScope(shield=True):
        identity = await trio.to_thread.run_sync(_identify_and_close, fd)
    return place, identity


def _identify_and_close(fd: int) -> Identity:
    try:
        return identify(fd)
    finally:
        os.close(fd)


async def forget(environment: Environment, image: ImageRecord) -> None:
    """Forget an image that no node has. Raises ``OSError``."""
    # First its marks: those without a record are taken for those of a lost one.
    await trio.to_thread.run_sync(marks.delete, environment.disk, image.row)
    await environment.commits.commit(Pending(changes.forget_image(image.row)))
