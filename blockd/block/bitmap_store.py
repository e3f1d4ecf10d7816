"""Where the bitmaps of a node are kept while it is not open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from blockd.bitmap import DirtyBitmap, Inconsistent, Recording, Stopped


class KeptBitmap(NamedTuple):
    """A bitmap as a store has it; its bits are given away with it."""

    name: str
    state: Recording | Stopped | Inconsistent


class BitmapStore(Protocol):
    """The bitmaps that outlive a node, as the node uses them. The async calls raise ``OSError``.

    What it keeps is either as good as what the node has, or *in use*: nobody else may rely on it,
    and after a crash it is inconsistent. The node calls, in this order::

        load             once, before anybody can use the node
        mark_in_use      before the first write can reach the storage
        check_new        for each new bitmap that is to be kept
        remove           for each that is to be kept no longer
        store            when nobody writes any more; then ``mark_in_use``, or nothing, follows

    While the storage is only read, ``load`` is all.
    """

    @property
    def keeps_any(self) -> bool:
        """Whether it has a place for bitmaps at all."""
        ...

    async def load(self) -> Sequence[KeptBitmap]:
        """What is kept. One in use is inconsistent; where it is damaged, nothing is kept."""

    async def mark_in_use(self) -> None:
        """On return all that is kept is in use, and a crash leaves it so."""

    def check_new(self, name: str, granularity_bytes: int, others: Sequence[DirtyBitmap]) -> None:
        """Raise ``BlockdError`` where another bitmap than ``others`` can't be kept as well."""

    async def remove(self, name: str) -> None:
        """Forget a bitmap for good; nothing happens where it was not stored yet."""

    async def store(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Keep these (the newest first) as they are now, and no others.

        Inconsistent ones stay as the store has them. After an error those that were in use still
        are.
        """
