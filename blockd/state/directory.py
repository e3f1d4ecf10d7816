"""A state directory, as the daemon sees it.

lock                which daemon has it
state.db            what must be atomic: images, bitmaps, armed regions, jobs
marks/IMAGE.EPOCH   which granules were written to in an epoch
marks/heartbeat     when the daemon was last alive, and how the images were then
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import (
    AsyncIterator,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from weakref import WeakSet

import trio

from blockd import limits
from blockd.bitmap import DirtyBitmap
from blockd.block import Coming, FileDriver, Node
from blockd.errors import BlockdError
from blockd.state import changes
from blockd.state.bounded import Bounded
from blockd.state.commits import Commits, Pending
from blockd.state.disk import Disk
from blockd.state.environment import Environment, Listener
from blockd.state.epochs import forget
from blockd.state.first_looks import FirstLooks
from blockd.state.host import Boot
from blockd.state.kept import Kept
from blockd.state.kept_image import KeptImage
from blockd.state.loading import delete_unused_pieces, put_in, recover_image
from blockd.state.opened import Opened, open_directory
from blockd.state.places import Place, find_place, identify, shape_of
from blockd.state.records import Identity, ImageRecord, JobRecord
from blockd.state.recovery import Circumstances, is_another, judge_image, left
from blockd.state.watch import Watch

_log = logging.getLogger(__name__)


class StateDirectory:
    """Keeps the persistent bitmaps of nodes; one daemon has it at a time."""

    keeps_any = True

    def __init__(
        self, nursery: trio.Nursery, listener: Listener, opened: Opened, boot: Boot, disk: Disk
    ) -> None:
        """For ``open``, and for tests."""
        self._nursery = nursery
        self._bounded = Bounded(nursery)
        self._listener = listener
        self._boot = boot
        self._opened = opened
        self._images = opened.images
        self._unfinished_jobs = opened.jobs
        #: Of these, which no new one has taken the place of.
        self._left_jobs = {job_id for job_id, _ in opened.jobs}
        self._attached: dict[Node, KeptImage] = {}
        #: For what began before, and ends late.
        self._closed: WeakSet[Node] = WeakSet()
        #: Those that the beat has begun to look after, which may take long where the disk hangs.
        self._looked_after: set[KeptImage] = set()
        self._attaching = trio.Lock()
        #: For measurements.
        self.commits = commits = Commits(opened.database, nursery)
        self._heartbeat = beat = opened.heartbeat
        self._environment = Environment(
            disk, commits, self._bounded, opened.rows, boot.boot_id, listener, beat
        )
        self._looks = FirstLooks(self._environment, self._images, boot, self._commit)
        self._watch = Watch(opened.heartbeat)
        self._left_recorded = False
        self._working = trio.CancelScope()
        nursery.start_soon(self._work)

    @classmethod
    async def open(cls, path: str, nursery: trio.Nursery, listener: Listener) -> StateDirectory:
        """Make or open one; its background work runs in ``nursery`` until ``close``.

        Raises ``BlockdError`` where another daemon has it, where another version made it, where
        others may write to it, and where it can't be used at all. A damaged one is used: its
        bitmaps will be all dirty.
        """
        try:
            opened, boot, disk = await trio.to_thread.run_sync(open_directory, path)
        except OSError as error:
            raise BlockdError(f"The state directory '{path}' can't be used: {error}") from error
        directory = cls(nursery, listener, opened, boot, disk)
        await directory.begin()
        return directory

    async def begin(self) -> None:
        """Record when a daemon was last alive, and how it left what it had open."""
        for row, image in self._images.items():
            if image.open and image.left_ns is None:
                seen = self._heartbeat.sightings.get(row)
                self._images[row] = left(image, self._boot, self._heartbeat.last_ns, seen)
        try:
            await self._record_left()
        except OSError as error:
            _log.error("the state directory can't be written to: %s", error)

    async def _record_left(self) -> None:
        """Raises ``OSError``: then it is to be tried again."""
        attached = self._attached_rows()
        unused = [image for image in self._images.values() if image.row not in attached]
        forget = changes.forget_jobs(tuple(self._left_jobs))
        change = changes.all_of(*map(changes.put_image, unused), forget)
        await self.commits.commit(Pending(change))
        self._left_recorded = True
        self._heartbeat.begin(self._images)
        self._nursery.start_soon(delete_unused_pieces, self.commits, self._opened.last_row)

    # -- nodes -------------------------------------------------------------------------------

    def check_persistent(self, node: Node) -> None:
        """Raise ``BlockdError`` where the node's image could not be recognised again."""
        place = find_place(node)
        for other, image in self._attached.items():
            if other is not node and image.record.key == place.key:
                raise BlockdError(
                    f"Node '{other.name}' keeps the bitmaps of '{place.path}': add it there"
                )

    async def look_at(self, file: Node) -> None:
        """A node is being opened over ``file``, which it may write to before it is attached,
        as to repair an image after a crash.

        ``attach`` judges the image as it is now. And where it has been left alone since a daemon
        had it open, it is recorded that we have it, up to ``opening_ended``: another crash finds
        no change but ours.
        """
        if not isinstance(file.driver, FileDriver):
            return
        place = find_place(file)
        identity = await self._identify(place.path, place.fd)
        if identity is not None:
            self._heartbeat.beat()
            await self._looks.look(
                place.path, identity, attached=self._attached_rows(), writable=not file.read_only
            )

    async def opening_ended(self) -> None:
        """What was looked at has been attached, or will not be."""
        await self._looks.end(attached=self._attached_rows())

    def _attached_rows(self) -> Collection[int]:
        return {keeper.record.row for keeper in self._attached.values()}

    async def _identify(self, path: str, fd: int) -> Identity | None:
        fd = os.dup(fd)
        try:
            return await trio.to_thread.run_sync(identify, fd)
        except OSError as error:
            _log.error("'%s' can't be recognised: %s", path, error)
            return None
        finally:
            os.close(fd)

    async def attach(self, node: Node) -> None:
        """Give a node that has just been opened the bitmaps which its image had.

        They are in ``node.bitmaps`` on return, and the node has its journal where there are any.
        Nothing about the state keeps a disk from opening: a bitmap whose bits are lost, or may
        not be trusted, is all dirty, with its ``reason`` set, and the listener has heard of it.
        Nothing happens for nodes that could not be recognised, nor for one whose bitmaps another
        node has. A bitmap that the node has already, consistent, stays, and ours goes.
        """
        try:
            place = find_place(node)
        except BlockdError:
            return
        async with self._attaching:
            identity = self._looks.found(place.path)
            if identity is None or isinstance(node.driver, FileDriver):
                identity = await self._identify(place.path, place.fd)
            if identity is None:
                return
            now = Circumstances(
                identity=identity,
                size_bytes=node.size_bytes,
                moved=False,
                boot_id=self._boot.boot_id,
            )
            if (image := self._at(place)) is None:
                now = dataclasses.replace(now, moved=True)
                image = self._moved_to(place, now)
            if image is not None and image.row not in self._attached_rows():
                await self._recover(node, image, now)

    def _at(self, place: Place) -> ImageRecord | None:
        """The image that was at the place."""
        return next((image for image in self._images.values() if image.key == place.key), None)

    def _moved_to(self, place: Place, now: Circumstances) -> ImageRecord | None:
        """The image that was at another place, if it is this without a doubt.

        A file's number is soon given to another file, and devices' numbers change with a boot.
        """
        for image in self._images.values():
            same = image.identity.surely_same_storage(now.identity)
            if same and shape_of(image.key) == place.shape and judge_image(image, now) is None:
                return image
        return None

    async def _recover(self, node: Node, image: ImageRecord, now: Circumstances) -> None:
        environment = self._environment
        recovery = await recover_image(image, now, environment.commits, environment.disk)
        kept = {}
        node.bitmaps.largest_bytes = max(node.size_bytes, image.largest_bytes)
        another = is_another(image, now.identity, self._boot)
        for found in recovery.bitmaps:
            bitmap = put_in(node, found, is_another=another)
            if bitmap is not None and found.record is not None:
                kept[bitmap] = Kept(found.record, bitmap.version, bitmap.gains)
            if bitmap is not None and found.reason is not None:
                self._listener.bitmap_recovered(node, bitmap)
        keeper = await self._keep(node, image, kept, as_stored=recovery.as_stored)
        if keeper is not None:
            keeper.found(now.identity)

    async def _keep(
        self, node: Node, image: ImageRecord, kept: Mapping[DirtyBitmap, Kept], *, as_stored: bool
    ) -> KeptImage | None:
        """None where the node has been closed meanwhile."""
        keeper = KeptImage(self._environment, node, image, kept, as_stored=as_stored)
        # It may have been long since there was anything to keep.
        self._heartbeat.beat()
        async with node.quiesced():
            if node in self._closed:
                return None
            node.keep_journal(keeper.journal)
            self._attached[node], self._images[image.row] = keeper, image
        return keeper

    async def expect(self, node: Node, coming: Coming) -> bool:
        """As ``Archive`` has it; as bounded as ``keep``."""

        async def store() -> None:
            keeper = await self._keeper(node, adopt=True)
            if keeper is not None:
                keeper.coming.add(coming)
                await keeper.checkpoint(whole=False)

        return await self._bounded.do(store)

    async def keep(self, node: Node) -> bool:
        """Return once the persistent bitmaps are durable as they are now: then True.

        To be called after every change of a bitmap that is not a guest write: added (the node
        gets its journal with the first), removed, cleared, merged, enabled, disabled, abdicated,
        resized. False where it gives up waiting after ``STATE_KEEP_SECONDS``, and where storing
        fails: then it is durable that the stored bitmaps are not right, as far as they would lack
        anything, and the listener has heard of that. For nodes without such bitmaps, ever, nothing
        is done.
        """

        async def store() -> None:
            has_any = not all(bitmap.inconsistent for bitmap in node.bitmaps.kept())
            keeper = await self._keeper(node, adopt=has_any)
            if keeper is not None:
                await keeper.keep(after=tuple(self._attached.values()))

        if await self._bounded.do(store):
            return True
        if keeper := self._attached.get(node):
            await self._bounded.do(keeper.give_up_storing, limits.STATE_POISON_SECONDS)
        return False

    async def _keeper(self, node: Node, *, adopt: bool) -> KeptImage | None:
        """None where the node is not kept; ``adopt``: it is from now on, if that is possible."""
        if keeper := self._attached.get(node):
            return keeper
        async with self._attaching:
            keeper = self._attached.get(node)
            return await self._adopt(node) if keeper is None and adopt else keeper

    async def _adopt(self, node: Node) -> KeptImage | None:
        """Keep a node from now on, where it is open."""
        try:
            place = find_place(node)
        except BlockdError:
            return None
        await self._forget_others(place)
        row = next(self._environment.rows)
        image = ImageRecord(
            row=row,
            key=place.key,
            identity=Identity(0, 0),
            size_bytes=node.size_bytes,
            open=False,
            boot_id=self._boot.boot_id,
            since=0,
            epoch=0,
            bitmaps=(),
        )
        return await self._keep(node, image, {}, as_stored=False)

    async def _forget_others(self, place: Place) -> None:
        """Forget what was at the place before, such as a file that an overlay has replaced.

        Its bitmaps are not the node's, and would be found in the place of these. ``OSError``.
        """
        taken = self._attached_rows()
        for image in tuple(self._images.values()):
            if image.key == place.key and image.row not in taken:
                _log.warning("'%s': the bitmaps of an earlier image are forgotten", image.key)
                await forget(self._environment, image)
                self._images.pop(image.row, None)

    async def store_all(self, node: Node) -> None:
        """Do now what is done at intervals; for tests and measurements. Raises ``OSError``."""
        await self._attached[node].checkpoint()

    async def settle(self, node: Node) -> None:
        """A node has become read-only: whoever writes to its image from now on is another.

        Its bitmaps are stored, and the image recorded as if it were closed; as bounded as ``keep``.
        """
        if keeper := self._attached.get(node):
            await self._bounded.do(keeper.settle)

    @asynccontextmanager
    async def closing(self, node: Node) -> AsyncIterator[None]:
        """The body closes the node's driver: nothing writes to the node any more.

        Before it the bitmaps are stored for the last time; after it the image is recorded as it
        then is, as closed cleanly. Where the body raises, or storing fails, its bitmaps will be
        all dirty when it is opened again.
        """
        self._closed.add(node)
        keeper = self._attached.get(node)
        if keeper is None:
            yield
            return
        try:
            async with keeper.closing():
                yield
        finally:
            del self._attached[node]
            self._images.pop(keeper.record.row)
            if keeper.record.bitmaps:
                self._images[keeper.record.row] = keeper.record

    # -- jobs --------------------------------------------------------------------------------

    async def record_job(self, job_id: str, facts: Mapping[str, str]) -> None:
        """Keep what is to be known of a job if the daemon dies; as bounded as ``keep``."""
        self._left_jobs.discard(job_id)
        await self._commit(changes.put_job(job_id, JobRecord(dict(facts))))

    async def forget_job(self, job_id: str) -> None:
        """The job has ended; as bounded as ``keep``."""
        await self._commit(changes.forget_jobs([job_id]))

    @property
    def unfinished_jobs(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """The jobs that a daemon before this one left behind, told once: at the next opening
        they are gone.
        """
        return self._unfinished_jobs

    # -- background --------------------------------------------------------------------------

    async def _commit(self, change: changes.Apply) -> bool:
        pending = Pending(change)
        return await self._bounded.do(lambda: self._environment.commits.commit(pending))

    async def _work(self) -> None:
        with self._working:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.commits.keep_short)
                nursery.start_soon(self._beat)

    async def _beat(self) -> None:
        """Note the time, and store what is due."""
        while True:
            await trio.sleep(limits.STATE_HEARTBEAT_SECONDS)
            if not self._left_recorded:
                with suppress(OSError):
                    await self._record_left()
            if self._attached or self._looks:
                self._heartbeat.beat()
                self._nursery.start_soon(self._watch.look, tuple(self._attached.values()))
            for keeper in self._attached.values():
                if keeper not in self._looked_after:
                    self._looked_after.add(keeper)
                    self._nursery.start_soon(self._look_after, keeper)

    async def _look_after(self, keeper: KeptImage) -> None:
        try:
            await keeper.look_after()
        finally:
            self._looked_after.discard(keeper)

    async def close(self) -> None:
        """End the background work and let go of the directory. All nodes are closed."""
        self._working.cancel()
        await self._watch.end()
        await self._environment.commits.read(lambda _: self._opened.end())
