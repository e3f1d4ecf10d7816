"""A node: one driver, the bitmaps that record its writes, and what must happen before a write."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from blockd import limits
from blockd.bitmap import NodeBitmaps
from blockd.block.accounting import Accounts, Inline
from blockd.block.allocation import Allocation
from blockd.block.bitmap_keeper import BitmapKeeper
from blockd.block.descriptor import Descriptor, WriteBy
from blockd.block.driver import Driver
from blockd.block.inflight import Gate
from blockd.block.journal import Journal
from blockd.block.permissions import Role, Users
from blockd.block.views import BeforeWrite, ReadView
from blockd.block.write_threshold import WriteThreshold
from blockd.errors import BlockdError, WouldBlock


class Node:
    """The device layer's unit: every read and write of a guest, an export or a job passes here.

    Invariant: a write reaches the driver only after it is noted in ``bitmaps.recent`` (which is
    folded into every recording bitmap before any of them is read or changed), after its journal,
    if it has one, has taken note of it, and after every hook holds the range's old data.

    ``read_nowait`` and ``write_nowait`` finish at once or raise ``WouldBlock``; they are looked
    up anew for each burst, because ``_choose_path`` puts the shortest one that is right in place
    whenever the node's state changes.
    """

    read_nowait: Callable[[int, memoryview], None]
    write_nowait: Callable[[int, memoryview], None]
    _write_unwatched: Callable[[int, memoryview], None]

    def __init__(self, name: str, driver: Driver) -> None:
        self.name = name
        self.driver = driver
        self.size_bytes = driver.size_bytes
        self.read_only = driver.read_only
        self.users = Users(name)
        #: Requests of the async calls, and of the nowait ones as far as their callers tell.
        self.accounts = Accounts()
        self.inline = Inline()
        self.write_threshold = WriteThreshold(on_change=self._choose_path)
        #: Those whose place this one has taken, and which have not been flushed since.
        self._unflushed: set[Node] = set()
        self._hooks: tuple[BeforeWrite, ...] = ()
        self._journal: Journal | None = None
        self._view: ReadView | None = None
        self._gate = Gate(on_change=self._choose_path)
        self._reads = Gate(on_change=self._choose_path)
        self.bitmaps = NodeBitmaps(driver.size_bytes)
        self.bitmaps.on_change = self._choose_path
        self.keeper = BitmapKeeper(name, self.bitmaps, driver.bitmap_store)
        self._choose_path()

    @property
    def path(self) -> str | None:
        """The regular file that the data ends up in, if it is one."""
        return self.driver.path

    @property
    def doubts(self) -> int:
        """As ``Driver.doubts``, with those of all that this node stands on."""
        driver = self.driver
        return driver.doubts + sum(child.doubts for child in driver.children.values())

    @property
    def backing(self) -> Node | None:
        """The backing file, if there is one."""
        return self.driver.children.get(Role.BACKING)

    # -- the nowait paths --------------------------------------------------------------------

    def _choose_path(self) -> None:
        readable = not self._reads.closed and self._view is None
        self.read_nowait = self.driver.read_nowait if readable else self._refuse
        if self._gate.closed or self.read_only:
            self._write_unwatched = self._refuse
        elif self._journal is not None:
            self._write_unwatched = self._write_journaled
        elif self._hooks:
            self._write_unwatched = self._write_hooked
        elif self.bitmaps.any_recording:
            self._write_unwatched = self._write_noted
        else:
            self._write_unwatched = self.driver.write_nowait
        watched = self.write_threshold.offset_bytes and not self._gate.closed
        self.write_nowait = self._write_watched if watched else self._write_unwatched

    def _refuse(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    def _note(self, offset: int, length: int) -> None:
        recent = self.bitmaps.recent
        recent.append((offset, length))
        if len(recent) >= limits.RECENT_WRITES_LIMIT:
            self.bitmaps.fold()

    def _write_journaled(self, offset: int, view: memoryview) -> None:
        if self._journal is None or not self._journal.note_nowait(offset, len(view)):
            raise WouldBlock
        if self._hooks:
            self._write_hooked(offset, view)
        else:
            self._write_noted(offset, view)

    def _write_noted(self, offset: int, view: memoryview) -> None:
        self._note(offset, len(view))
        self.driver.write_nowait(offset, view)

    def _write_hooked(self, offset: int, view: memoryview) -> None:
        for hook in self._hooks:
            if not hook.before_write_nowait(offset, len(view)):
                raise WouldBlock
        self._write_noted(offset, view)

    def _write_watched(self, offset: int, view: memoryview) -> None:
        self.write_threshold.look(offset + len(view))
        self._write_unwatched(offset, view)

    # -- the async paths ---------------------------------------------------------------------

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; the range lies within the size. Raises ``OSError``."""
        with self.accounts.read.of(len(view)):
            await self._reads.enter()
            try:
                await (self._view or self.driver).read(offset, view)
            finally:
                self._reads.leave()

    async def write(self, offset: int, view: memoryview, *, fua: bool = False) -> None:
        """Write ``view`` at ``offset``; with ``fua`` it is on stable storage on return."""
        with self.accounts.write.of(len(view)):
            await self._enter_write(offset, len(view))
            try:
                doubts = self.doubts if fua else 0
                await self.driver.write(offset, view)
                if fua:
                    await self._make_durable(doubts)
            finally:
                self._gate.leave()

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        """As ``write``, of whole clusters, which take less room where that is possible."""
        with self.accounts.write.of(len(view)):
            await self._enter_write(offset, len(view))
            try:
                await self.driver.write_compressed(offset, view)
            finally:
                self._gate.leave()

    def descriptor(self) -> Descriptor | None:
        """The node's bytes by a descriptor to read from, where it has one."""
        return None if self._view is not None else self.driver.descriptor()

    @property
    def takes_write_by(self) -> bool:
        """Whether there is ``write_by``."""
        return not self.read_only and self.driver.takes_write_by

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        """As ``Driver.write_by``. For the bitmaps and views of this node, and of those below, all
        of the range is written.
        """
        await self._enter_write(offset, length)
        try:
            return await self.driver.write_by(offset, length, call)
        finally:
            self._gate.leave()

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; its space is given back where ``unmap`` allows that."""
        with self.accounts.write.of(length):
            await self._enter_write(offset, length)
            try:
                doubts = self.doubts if fua else 0
                await self.driver.write_zeroes(offset, length, unmap=unmap)
                if fua:
                    await self._make_durable(doubts)
            finally:
                self._gate.leave()

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        """As ``Driver.zeroes_fast``."""
        return self.driver.zeroes_fast(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give up the range's content. It counts as a write: what it reads as may change.

        Where discards are ignored nothing changes, and the bitmaps and views are left alone.
        """
        if self.driver.ignores_discards:
            await self._pass_over_discard(length, fua=fua)
            return
        with self.accounts.unmap.of(length):
            await self._enter_write(offset, length, discard=True)
            try:
                doubts = self.doubts if fua else 0
                await self.driver.discard(offset, length)
                if fua:
                    await self._make_durable(doubts)
            finally:
                self._gate.leave()

    async def _pass_over_discard(self, length: int, *, fua: bool) -> None:
        self._check_writable()
        with self.accounts.unmap.of(length):
            if fua:
                await self.flush()
            else:
                await trio.lowlevel.checkpoint()

    async def _make_durable(self, doubts: int) -> None:
        """Flush what was written since there were so many ``doubts``; EIO where it may be lost."""
        await self.driver.flush()
        if self.doubts != doubts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def flush(self) -> None:
        """Return once every write that had completed before is on stable storage."""
        with self.accounts.flush.of(0):
            await self._flush_predecessors()
            await self._reads.enter()
            try:
                await self.driver.flush()
            finally:
                self._reads.leave()

    async def _flush_predecessors(self) -> None:
        for node in tuple(self._unflushed):
            await node.flush()
            self._unflushed.discard(node)

    def owe_flush(self, node: Node) -> None:
        """Take the place of ``node``: its writes too are on stable storage after a flush."""
        self._unflushed.add(node)

    def owe_no_flush(self, node: Node) -> None:
        """``node`` has its place back, or is gone."""
        self._unflushed.discard(node)

    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        """The range's allocation, as ``Driver.allocation`` gives it."""
        await self._reads.enter()
        try:
            return await (self._view or self.driver).allocation(offset, length)
        finally:
            self._reads.leave()

    async def allocated_bytes(self) -> int:
        """How much space the storage takes. Raises ``OSError``."""
        await self._reads.enter()
        try:
            return await self.driver.allocated_bytes()
        finally:
            self._reads.leave()

    async def _enter_write(self, offset: int, length: int, *, discard: bool = False) -> None:
        """Do what precedes every write. On return the caller owes one ``_gate.leave()``."""
        await self._gate.enter()
        try:
            # Now, for it may have become read-only while the gate was shut.
            self._check_writable()
            if self._journal is not None:
                await self._journal.note(offset, length)
            self._note(offset, length)
            if not discard:
                self.write_threshold.look(offset + length)
                self.accounts.highest = max(self.accounts.highest, offset + length)
            for hook in self._hooks:
                await hook.before_write(offset, length)
        except BaseException:
            self._gate.leave()
            raise

    def _check_writable(self) -> None:
        if self.read_only:
            raise PermissionError(errno.EPERM, f"node '{self.name}' is read-only")

    # -- its size ----------------------------------------------------------------------------

    async def resize(self, size_bytes: int) -> None:
        """Cut the node's end off, or put zeroes behind it; its bitmaps follow.

        Nobody else relies on the size. Raises ``OSError``, or ``BlockdError``.
        """
        if size_bytes > limits.NODE_BYTES:
            raise BlockdError(f"offset({size_bytes}) exceeds maximum({limits.NODE_BYTES})")
        if self.read_only:
            raise BlockdError("Image is read-only")
        async with self.quiesced():
            self.keeper.check_resizable()
            try:
                await self.driver.truncate(size_bytes)
            finally:
                self._follow_driver()

    def child_changed(self) -> None:
        """A node below has another size, or another one has taken its place."""
        self.driver.child_changed()
        self._follow_driver()

    def _follow_driver(self) -> None:
        if self.size_bytes != self.driver.size_bytes:
            self.size_bytes = self.driver.size_bytes
            self.bitmaps.resize(self.size_bytes)

    # -- one instant -------------------------------------------------------------------------

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """The body runs with no write in flight and none beginning.

        What it does without an await happens at one instant, as the guest sees it.
        """
        rest = self.at_rest() if self.driver.writes_at_reads else self._gate.shut()
        with self.driver.hurried():
            async with rest:
                yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """The body runs with nothing at all under way in the driver, and nothing beginning."""
        with self.driver.hurried():
            async with self._gate.shut(), self._reads.shut():
                yield

    def change_driver(self, driver: Driver) -> None:
        """Stand on other storage, or on the same in another way; only while at rest.

        The node's size stays until ``child_changed``.
        """
        assert self._reads.closed
        driver.take_over(self.driver)
        driver.on_corruption = self.driver.on_corruption
        self.driver = driver
        self.read_only = driver.read_only
        self._choose_path()

    async def make_read_only(self) -> None:
        """Flush it, and write no more: nobody wants to. Raises ``OSError``.

        At rest, for what a reader still uses could not be given back to the storage any more.
        """
        async with self.at_rest():
            if self.read_only:
                return
            await self._flush_predecessors()
            await self.driver.flush()
            # From now on nobody can write, so that what is kept now stays right.
            self.read_only = True
            try:
                await self.keeper.save()
                await self.driver.make_read_only()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.keeper.resume()
                self.read_only = False
                raise
            self.keeper.set_read_only(read_only=True)

    async def close(self) -> None:
        """Close the driver, once all is over that was asked of the node while it had users."""
        async with self.at_rest():
            await self.driver.close()

    def show(self, view: ReadView | None) -> None:
        """Let readers from now on get ``view``; None: what the driver has."""
        self._view = view
        self._choose_path()

    @property
    def journal(self) -> Journal | None:
        """What takes note of every write before it happens, if anything does."""
        return self._journal

    def keep_journal(self, journal: Journal | None) -> None:
        """Let writes be noted there from now on; only while quiesced, so that it misses none."""
        assert self._gate.closed
        self._journal = journal
        self._choose_path()

    def add_hook(self, hook: BeforeWrite) -> None:
        """Put a point-in-time view in; only while quiesced, so that it misses no write."""
        assert self._gate.closed
        self._hooks = (*self._hooks, hook)
        self._choose_path()

    def remove_hook(self, hook: BeforeWrite) -> None:
        """Take a point-in-time view out.

        One that has not given up its claim on old data yet: only while quiesced.
        """
        self._hooks = tuple(other for other in self._hooks if other is not hook)
        self._choose_path()
