"""The mark beside a target file that says: this backup is incomplete, do not restore from it.

It is there, durably, before the first byte is copied, and goes once the target is durable. So it
outlives a killed daemon. It also says what would complete the target; a later backup to the same
file that does less leaves it there.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import trio

from blockd.bitmap import DirtyBitmap

_log = logging.getLogger(__name__)

SUFFIX = ".blockd-incomplete"

_EXPLANATION = "An incomplete backup made by blockd: do not restore from it."


@dataclass(frozen=True, slots=True)
class BitmapNeed:
    """One bitmap, of which a backup must be made.

    A later one of the same name does not know what this one knew; hence the ``identity``.
    """

    node: str
    name: str
    identity: str

    @classmethod
    def of(cls, node: str, bitmap: DirtyBitmap) -> Self:
        return cls(node, bitmap.name, bitmap.identity)


@dataclass(frozen=True, slots=True)
class Needs:
    """What would complete a target: a full backup, or a backup of each of these bitmaps.

    A successful full backup completes every target. ``kept``: what failed backups brought to the
    target, their bitmaps may have forgotten.
    """

    full: bool = False
    bitmaps: frozenset[BitmapNeed] = frozenset()
    kept: bool = False

    def __bool__(self) -> bool:
        return self.full or bool(self.bitmaps)

    def __str__(self) -> str:
        names = sorted(f"bitmap '{each.name}' of node '{each.node}'" for each in self.bitmaps)
        return "a full backup" if self.full else f"a backup of {' and of '.join(names)}"

    def plus(self, need: BitmapNeed, *, forgets: bool) -> Needs:
        """What is needed after a backup of this bitmap has begun to change the target."""
        if self.full:
            return self
        return Needs(bitmaps=self.bitmaps | {need}, kept=self.kept or forgets)

    def minus(self, need: BitmapNeed) -> Needs:
        """What is still needed after a backup of this bitmap has succeeded."""
        return Needs(self.full, self.bitmaps - {need}, self.kept)


FULL = Needs(full=True)


class IncompleteMark:
    """The mark of one backup's target file. Every call returns when its effect is durable.

    They raise ``OSError`` where the directory of the target can't be read or written.
    """

    def __init__(
        self,
        target_path: str,
        job_id: str,
        *,
        full: bool,
        need: BitmapNeed | None,
        emptied: bool,
        layer: bool = False,
        forgets: bool = False,
    ) -> None:
        """``full``: the backup copies everything. ``need``: the bitmap that it uses, if any.

        ``emptied``: the target is empty before, so that less than everything never completes it,
        unless it is a ``layer`` to be put upon another image. ``forgets``: the bitmap forgets what
        was copied even where the backup fails.
        """
        self.path = target_path + SUFFIX
        self._job_id = job_id
        self._full = full or need is None
        self._need = need
        self._emptied = emptied
        self._layer = layer
        self._forgets = forgets
        #: What the mark says now, and what it said before this backup; None: it was not put.
        self._needs = Needs()
        self._before: Needs | None = None

    async def put(self) -> None:
        """Before anything is copied: say that the target is incomplete.

        What an earlier backup left to be done stays in the mark, unless this one does it all.
        """
        before = await trio.to_thread.run_sync(self._read)
        self._before = before
        if self._full or self._need is None:
            await self._change(FULL)
        elif not self._emptied:
            await self._change(before.plus(self._need, forgets=self._forgets))
        elif self._layer and not before.kept:
            await self._change(Needs().plus(self._need, forgets=self._forgets))
        else:
            await self._change(FULL)

    async def withdraw(self) -> None:
        """Nothing was done to the target after all: it is what it was before ``put``."""
        if self._before is not None:
            await self._change(self._before)

    async def satisfy(self) -> None:
        """After everything is durable: this backup has done its part."""
        if self._full or self._need is None:
            await self._change(Needs())
        else:
            await self._change(self._needs.minus(self._need))
        if self._needs:
            _log.warning("'%s' stays: the target still needs %s", self.path, self._needs)

    async def leave_to_bitmap(self) -> None:
        """The backup's bitmap knows all that is missing, so no other full backup is needed."""
        if self._needs.full and self._full and self._need is not None:
            await self._change(Needs(bitmaps=frozenset({self._need}), kept=True))

    async def _change(self, needs: Needs) -> None:
        await trio.to_thread.run_sync(self._write if needs else self._remove, needs)
        self._needs = needs

    def _read(self) -> Needs:
        try:
            with open(self.path, "rb") as file:
                return _parse(json.load(file))
        except FileNotFoundError:
            return Needs()
        except (PermissionError, ValueError, TypeError, KeyError):
            _log.warning("'%s' can't be understood, so only a full backup completes it", self.path)
            return FULL

    def _write(self, needs: Needs) -> None:
        temporary = f"{self.path}.{secrets.token_hex(8)}"
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                json.dump(self._contents(needs), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self.path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._sync_directory()

    def _remove(self, _: Needs) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _contents(self, needs: Needs) -> dict[str, Any]:
        bitmaps = sorted(needs.bitmaps, key=lambda each: (each.node, each.name, each.identity))
        return {
            "explanation": _EXPLANATION,
            "job": self._job_id,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "needs": {
                "full": needs.full,
                "kept": needs.kept,
                "bitmaps": [
                    {"node": each.node, "name": each.name, "identity": each.identity}
                    for each in bitmaps
                ],
            },
        }


def _parse(contents: dict[str, Any]) -> Needs:
    needs = contents["needs"]
    bitmaps = (BitmapNeed(**{key: str(each[key]) for key in each}) for each in needs["bitmaps"])
    parsed = Needs(bool(needs["full"]), frozenset(bitmaps), bool(needs.get("kept")))
    return parsed or FULL
