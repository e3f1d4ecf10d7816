"""What a node's driver must offer. Drivers live in ``block/drivers``, one small file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from blockd.errors import BlockdError, WouldBlock

if TYPE_CHECKING:
    # It stands on system calls that speak of allocation, as this module defines it.
    from blockd.block.allocation import Allocation
    from blockd.block.bitmap_store import BitmapStore
    from blockd.block.node import Node
from blockd.block.accounting import Counts
from blockd.block.descriptor import Descriptor, WriteBy
from blockd.block.permissions import Access, Role, of_backing_file, of_part


class Corruption(NamedTuple):
    """Why an image can't be right. ``fatal``: nothing is done with it any more."""

    reason: str
    fatal: bool


class Driver(ABC):
    """Bytes on some storage, from 0 to ``size_bytes``.

    The caller (``Node``) has checked every range: it lies within the size, its length is not 0,
    and a read-only driver is not written to. An ``OSError`` says that an I/O failed; after a
    failed write the range's content is unknown. The async calls may run at once and in any
    order; overlapping ones may take effect in any order. A cancelled call may have taken effect
    when it raises, and takes none afterwards.
    """

    #: The driver's name in QMP ("file", "raw", …).
    name: str
    size_bytes: int
    read_only: bool
    #: Bytes; what the storage allocates at a time, or None where it has no such unit.
    cluster_size_bytes: int | None = None
    #: How QMP names the storage.
    filename: str
    #: Whether I/O passes the host's page cache by.
    direct: bool = False
    #: Whether ``flush`` does anything.
    flushes: bool = True

    #: Whether it can stand on a backing file.
    supports_backing: bool = False
    #: Whether it can ``write_compressed``.
    compresses: bool = False
    #: Whether a read may write to the nodes that this one stands on.
    writes_at_reads: bool = False
    #: Whether others may resize the nodes that this one stands on (``child_changed``).
    follows_child_size: bool = False

    #: Whether ``discard`` does nothing, so that nothing changes by it.
    ignores_discards: bool = False

    #: How often it came back to storage that may have lost completed writes which no flush had
    #: made durable yet.
    doubts: int = 0

    #: Where the storage keeps bitmaps of the node while it is not open, if it can.
    bitmap_store: BitmapStore | None = None
    #: Called, if it is set, when what is on the storage turns out to be damaged.
    on_corruption: Callable[[Corruption], None] | None = None

    #: What tells the storage from any other, where that can be told.
    identity: tuple[int, int] | None = None

    #: How far on in the node below a nowait request begins, where it is one request there too.
    inline_offset_bytes: int | None = None
    #: The discards that reached the storage, where they are counted.
    discards: Counts | None = None

    @property
    def children(self) -> Mapping[Role, Node]:
        """The nodes that this one stands on, by how it uses them; the graph claims them."""
        return {}

    def child_access(self, role: Role, access: Access) -> Access:
        """What it does with the child in ``role`` while its own users have ``access`` to it."""
        if role is Role.BACKING:
            return of_backing_file(access)
        return access if self.follows_child_size else of_part(access)

    def replace_child(self, role: Role, node: Node | None) -> None:
        """Stand on another node, or on none, in ``role``; nothing is under way there.

        The graph calls it, where the driver has such children at all.
        """
        raise AssertionError(f"'{self.name}' has no child '{role.value}'")

    @property
    def options(self) -> dict[str, Any]:
        """What it is made from, as QEMU's pseudo-protocol "json:" names it.

        A file name is there where that is all that matters, and not in a driver with children.
        """
        return {"driver": self.name, "filename": self.filename}

    @property
    def path(self) -> str | None:
        """The regular file that the data ends up in, if it is one."""
        return None

    def descriptor(self) -> Descriptor | None:
        """The bytes by a descriptor, where reading that way is the same thing."""
        return None

    @property
    def takes_write_by(self) -> bool:
        """Whether there is ``write_by``."""
        return False

    async def write_by(self, offset: int, length: int, call: WriteBy) -> int:
        """Let ``call`` write to the range, from its start on, in a worker thread.

        It is called for one part after the other, as they lie together in the storage, until it
        has not written all of one; then what it wrote of its last cluster may not count. Returns
        up to where it wrote. A thread that runs is not cancelled. Raises ``OSError`` where a part
        can't be written to, before ``call`` is called for it.
        """
        raise AssertionError(f"'{self.name}' is not written to that way")

    def debug_event(self, event: str) -> None:  # noqa: B027 - only one driver listens
        """Hear that what stands above has come to ``event`` (QEMU's names); for ``blkdebug``."""

    def read_nowait(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` at once, or raise ``WouldBlock`` (view then undefined)."""
        raise WouldBlock

    def write_nowait(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at ``offset`` at once, or raise ``WouldBlock`` having written nothing."""
        raise WouldBlock

    @abstractmethod
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""

    @abstractmethod
    async def write(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at ``offset``; ``view`` must not change until this returns."""

    async def write_compressed(self, offset: int, view: memoryview) -> None:
        """As ``write``, but in less room where the driver ``compresses``: whole clusters of it."""
        await self.write(offset, view)

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeroes; give its space back where ``unmap`` allows it."""

    def zeroes_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Whether ``write_zeroes`` takes less than writing as many zeroes, as far as is known."""
        return False

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The range's content is no longer needed; what it reads as afterwards is open."""

    @abstractmethod
    async def flush(self) -> None:
        """Return once all completed writes are on stable storage."""

    @abstractmethod
    async def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        """How the range is allocated: runs in order, without gaps, from ``offset`` on.

        It may stop short of the range's end, but says something about its first byte.
        """

    async def truncate(self, size_bytes: int) -> None:
        """Give the storage another size: its end is cut off, or zeroes are put behind it.

        ``size_bytes`` of the driver becomes that, rounded up where it can have whole sectors only.
        No write is in flight. Raises ``OSError``; ``BlockdError`` where it never could.
        """
        raise BlockdError("Image format driver does not support resize")

    def hold_to_resize(self) -> None:
        """Stand below an image, which changes the size whenever it needs to.

        Raises ``BlockdError`` where a user of the storage that no node knows of relies on it.
        """
        if Role.FILE in self.children:
            self.children[Role.FILE].driver.hold_to_resize()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Somebody waits until nothing is under way: what holds a request back only to slow it
        down lets it pass, here and below.
        """
        with ExitStack() as below:
            for child in self.children.values():
                below.enter_context(child.driver.hurried())
            yield

    def take_over(self, before: Driver) -> None:  # noqa: B027 - most have nothing to take over
        """Go on where ``before``, over the same storage, ends; called as it is replaced."""

    def keep_writers_out(self, *, beside_writer: bool = False) -> None:
        """Let nobody else write to the storage, for it can't be read while others change it.

        ``beside_writer``: another driver of ours over it does, and is about to be closed. Raises
        ``BlockdError`` where somebody else does. May block for a moment.
        """
        for role, child in self.children.items():
            if role is not Role.BACKING:
                child.driver.keep_writers_out(beside_writer=beside_writer)

    async def suspend(self) -> None:  # noqa: B027 - most are always in order
        """Leave the storage in order, as for ``close``; nothing is written until ``resume``.

        Another driver may take over meanwhile. All is flushed. Raises ``OSError``.
        """

    async def resume(self) -> None:  # noqa: B027 - most are always ready
        """Be ready to write, after ``suspend`` or having taken over; nothing is to be done where
        it is. Raises ``OSError``, or ``BlockdError`` where the storage is not as it was left.
        """

    async def make_read_only(self) -> None:
        """Let go of what only a writer needs: nothing is written any more. All is flushed.

        Raises ``OSError``, and then it can be written to as before.
        """
        self.read_only = True

    def child_changed(self) -> None:  # noqa: B027 - most need to do nothing
        """A node below has another size, or another one has taken its place: follow it.

        What this driver says of itself may depend on that.
        """

    @abstractmethod
    async def allocated_bytes(self) -> int:
        """How much space the storage takes for this."""

    @abstractmethod
    async def close(self) -> None:
        """Give up the storage. Nothing is called afterwards. It does not flush."""
