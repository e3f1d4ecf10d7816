"""The bitmaps of a node that outlive it, between the node and their store."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from blockd.bitmap import NodeBitmaps
from blockd.block.bitmap_store import BitmapStore
from blockd.errors import BlockdError

log = logging.getLogger(__name__)


class BitmapKeeper:
    """Knows when one node's store is asked for what; ``BitmapStore`` has the rules."""

    def __init__(self, node_name: str, bitmaps: NodeBitmaps, store: BitmapStore | None) -> None:
        self._node_name = node_name
        self._bitmaps = bitmaps
        #: None: nothing is kept. Another one takes its place only before ``load``.
        self.store = store
        self._loaded = False

    async def load(
        self,
        *,
        read_only: bool,
        before_use: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
    ) -> None:
        """Take over what is kept, before anybody uses the node. Raises ``BlockdError``.

        ``before_use`` is awaited when the bitmaps are there and the storage is still as it was.
        Where this fails once some of it may be in use, ``save`` puts it in order again.
        """
        try:
            kept = [] if self.store is None else await self.store.load()
        except OSError as error:
            raise BlockdError(f"Failed to read bitmap directory: {error.strerror}") from error
        for name, state in kept:
            self._bitmaps.add_kept(name, state, read_only=read_only)
        self._loaded = self.store is not None
        await before_use()
        if self.store is not None and not read_only:
            try:
                await self.store.mark_in_use()
            except OSError as error:
                raise BlockdError(f"Can't update bitmap directory: {error.strerror}") from error

    def check_new(self, name: str, granularity_bytes: int) -> None:
        """Raise ``BlockdError`` where the store can't keep a new bitmap."""
        assert self.store is not None
        try:
            self.store.check_new(name, granularity_bytes, self._bitmaps.kept())
        except BlockdError as error:
            raise BlockdError(
                f"Can't make bitmap '{name}' persistent in '{self._node_name}': {error.message}"
            ) from None

    def check_resizable(self) -> None:
        """Raise ``BlockdError`` where one of them can't follow the node to another size."""
        for bitmap in self._bitmaps.kept():
            bitmap.check_usable(to_change=True)

    async def remove(self, name: str) -> None:
        """Remove a bitmap of the node, whether it is kept or not.

        Raises ``BlockdError`` where that is refused, ``OSError``; then it is still there.
        """
        bitmap = self._bitmaps.get(name)
        release = bitmap.pin_to_remove()
        try:
            if bitmap.persistent and self.store is not None:
                await self.store.remove(name)
        finally:
            release()
        self._bitmaps.remove(name)

    async def forget_removed(self, name: str) -> None:
        """Forget a bitmap that the node has not any more.

        Where that fails it is in use, so nobody relies on it, and is forgotten when the node ends.
        """
        if self.store is None or self._bitmaps.has(name):
            return
        try:
            await self.store.remove(name)
        except OSError as error:
            log.warning(
                "bitmap '%s' of node '%s' is removed, but still in its image: %s",
                name,
                self._node_name,
                error.strerror,
            )

    async def save(self) -> None:
        """Keep all as they are now, for nobody writes to the node any more. Raises ``OSError``."""
        if self.store is None or not self._loaded:
            return
        try:
            await self.store.store(sorted(self._bitmaps.kept(), key=lambda each: -each.rank))
        except OSError as error:
            self.tell_loss(error)
            raise

    def tell_loss(self, error: OSError) -> None:
        """Those that the store has are in use, and will not be saved, because of ``error``."""
        if self.store is not None and self._loaded and self._bitmaps.kept():
            log.error("bitmaps of node '%s' are lost: %s", self._node_name, error.strerror)

    async def resume(self) -> None:
        """After ``save`` there will be writes again, once this has returned. Raises ``OSError``."""
        if self.store is not None:
            await self.store.mark_in_use()

    def set_read_only(self, *, read_only: bool) -> None:
        """Let nobody change what can't be stored, or let them again."""
        for bitmap in self._bitmaps.kept():
            bitmap.read_only = read_only
