"""One named dirty bitmap, and the tokens of those who use it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol, assert_never

from pyroaring import BitMap64

from blockd.bitmap.bits import Bits
from blockd.bitmap.format import window_count
from blockd.bitmap.reason import Reason
from blockd.bitmap.states import (
    Frozen,
    Inconsistent,
    Pinned,
    Recording,
    State,
    Stopped,
    idle,
)
from blockd.errors import BlockdError


class Owner(Protocol):
    """The node's bitmaps, as one of them sees them."""

    def fold(self) -> None:
        """Move the recent writes into every recording bitmap, as these are now."""

    def recording_changed(self) -> None:
        """A bitmap may have begun or ceased to record."""

    def next_rank(self) -> int:
        """A place in the listing, newer than all given so far."""


class Freeze:
    """The right to end one freeze, once. Who holds it decides what becomes of the bitmap.

    Ending it a second time is a mistake of ours: ``RuntimeError``, with nothing changed.
    """

    __slots__ = ("_abdicate", "_reclaim", "_spent", "snapshot", "successor")

    def __init__(
        self,
        snapshot: Bits,
        successor: Bits,
        reclaim: Callable[[Bits | None], None],
        abdicate: Callable[[Bits | None], None],
    ) -> None:
        #: The bits at the instant of the freeze; nobody changes them until it ends.
        self.snapshot = snapshot
        #: What the guest wrote since, but for the recent writes that were not folded in yet.
        self.successor = successor
        self._reclaim = reclaim
        self._abdicate = abdicate
        self._spent = False

    def reclaim(self, torn: Bits | None = None) -> None:
        """The backup failed: the bitmap is what it was, what was written since, and ``torn``.

        ``torn`` is what the backup may have damaged on the target, in the bitmap's granularity. It
        is given away with the call.
        """
        self._spend()
        self._reclaim(torn)

    def abdicate(self, keep: Bits | None = None) -> None:
        """The backup is durable: the bitmap is what was written since, and ``keep``.

        ``keep`` is what the backup did not copy after all, in any granularity (it is rounded
        outward). It is given away with the call.
        """
        self._spend()
        self._abdicate(keep)

    def _spend(self) -> None:
        if self._spent:
            raise RuntimeError("this freeze of a bitmap has ended")
        self._spent = True


class Pin:
    """The right to end one use of a bitmap by a reader, once (``RuntimeError`` after that)."""

    __slots__ = ("_look", "_release", "_spent")

    def __init__(self, release: Callable[[], None], look: Callable[[], Bits]) -> None:
        self._release = release
        self._look = look
        self._spent = False

    @property
    def bits(self) -> Bits:
        """What is marked now, to be read only; guest writes go on being marked there."""
        return self._look()

    def release(self) -> None:
        """The bitmap is free again, as it is now."""
        if self._spent:
            raise RuntimeError("this pin of a bitmap has ended")
        self._spent = True
        self._release()


class DirtyBitmap:
    """A named bitmap of a node. Every command that is refused changes nothing.

    All calls are plain functions: nothing comes between a check and the change it guards. Each
    one first folds the node's recent writes into the bitmaps as they are, so that what is read
    is complete, and a write is marked by the state in which it arrived.
    """

    def __init__(self, owner: Owner, name: str, state: Recording | Stopped | Inconsistent) -> None:
        self._owner = owner
        self._state: State = state
        #: The place in the node's listing; the newer, the higher.
        self.rank = owner.next_rank()
        self.name = name
        #: What tells it from any other of its name. From the start, so that it is kept with it.
        self.identity = secrets.token_hex(16)
        #: Whether the bitmap is to outlive the node.
        self.persistent = False
        #: Rises when bits change in another way than by guest writes: then all of them may have.
        self.version = 0
        #: Rises when that may have added bits, or when guest writes begin to be marked: what was
        #: stored before may lack some now, whatever was marked beside it since.
        self.gains = 0
        #: Why it came back other than it was; None once that is cleared or backed up.
        self.reason: Reason | None = None
        #: Whether it must stay as it is in the image, which can't be written to.
        self.read_only = False

    @property
    def state(self) -> State:
        self._owner.fold()
        return self._state

    @property
    def granularity_bytes(self) -> int:
        return self._named_bits.granularity_bytes

    @property
    def recording(self) -> bool:
        """Whether guest writes are marked now, in the bitmap or in its successor."""
        return self.recording_bits is not None

    @property
    def recording_bits(self) -> Bits | None:
        """Where guest writes are to be marked now; for the fold, so it does not fold."""
        match self._state:
            case Recording(bits=bits) | Pinned(bits=bits, recording=True):
                return bits
            case Frozen(successor=successor, recording=True):
                return successor
            case Stopped() | Frozen() | Pinned() | Inconsistent():
                return None
            case _ as never:
                assert_never(never)

    @property
    def busy(self) -> bool:
        """Whether a job or an export uses the bitmap."""
        return isinstance(self._state, Frozen | Pinned)

    @property
    def inconsistent(self) -> bool:
        """Whether nobody knows what is dirty; such a bitmap can only be removed."""
        return isinstance(self._state, Inconsistent)

    @property
    def count_bytes(self) -> int:
        """Dirty bytes of the named bitmap, without its successor."""
        self._owner.fold()
        return self._named_bits.count_bytes

    def copy_bits(self) -> Bits:
        """A copy of the named bitmap's bits, without its successor's, in every state."""
        self._owner.fold()
        return self._named_bits.copy()

    def window(self, number: int) -> BitMap64:
        """A copy of one window's granules, as a store keeps them.

        A frozen bitmap is kept as its reclaim would leave it, since a crash is one.
        """
        self._owner.fold()
        granules = self._named_bits.window(number)
        if isinstance(self._state, Frozen):
            granules |= self._state.successor.window(number)
        return granules

    @property
    def window_count(self) -> int:
        """How many windows the bitmap has."""
        return window_count(self._named_bits.granule_count)

    def check_usable(self, *, to_change: bool) -> None:
        """Raise ``BlockdError`` where a command about the bitmap would be refused.

        ``to_change``: one that changes it, which a read-only one does not stand.
        """
        self._check_idle()
        if to_change:
            self._check_writable()
        self._usable()

    def check_removable(self) -> None:
        """Raise ``BlockdError`` where the bitmap may not be removed now."""
        self._check_idle()
        self._check_writable()

    def usable_bits(self) -> Bits:
        """The bits, to be merged elsewhere; ``BlockdError`` where the bitmap can't be used."""
        self._owner.fold()
        return self._usable().bits

    def bits_to_keep(self) -> Bits:
        """A copy of all that is marked; of a frozen one too, whose job may fail after this."""
        bits = self.copy_bits()
        if isinstance(self._state, Frozen):
            bits.merge(self._state.successor)
        return bits

    def _bits_to_change(self) -> Bits:
        self.check_usable(to_change=True)
        return self.usable_bits()

    def enable(self) -> None:
        """Mark guest writes from now on. Nothing happens where that is so already."""
        bits = self.usable_bits()
        self.gains += not self.recording
        self._become(Recording(bits))

    def disable(self) -> None:
        """Mark no guest writes from now on. Nothing happens where that is so already."""
        self._become(Stopped(self.usable_bits()))

    def clear(self) -> Bits:
        """Forget every mark; the result is what was marked, for ``put_back``."""
        bits = self._bits_to_change()
        self._replace(bits.empty_copy())
        self.reason = None
        return bits

    def merge_from(self, sources: Sequence[Bits]) -> Bits:
        """Add the bits of all ``sources``, or of none where the size of one differs.

        The result is what was marked before, for ``put_back``.
        """
        bits = self._bits_to_change()
        for source in sources:
            bits.check_same_size(source)
        merged = bits.copy()
        for source in sources:
            merged.merge(source)
        self.put_back(merged)
        return bits

    def put_back(self, bits: Bits) -> None:
        """Mark what is marked in ``bits``, and nothing else; they are given away with the call."""
        self._replace(bits)
        self.gains += 1

    def _replace(self, bits: Bits) -> None:
        self._owner.fold()
        self._become(idle(bits, recording=isinstance(self._usable(), Recording)))
        self.version += 1

    def distrust(self, reason: Reason) -> None:
        """Mark everything, whoever uses the bitmap: writes have come by another way.

        A frozen one has all of it when its job ends, for what the job has read may be either.
        """
        state = self.state
        bits = state.successor if isinstance(state, Frozen) else self._named_bits
        bits.mark_all()
        self.reason = reason
        self.version += 1
        self.gains += 1

    def freeze(self, job: str) -> Freeze:
        """Set the bits aside for ``job``; guest writes are marked in a successor from now on.

        Nothing is copied, so this takes the same time however large the bitmap is.
        """
        snapshot = self.usable_bits()
        successor = snapshot.empty_copy()
        rank = self._owner.next_rank()
        self._become(Frozen(snapshot, successor, self.recording, job, rank))
        return Freeze(snapshot, successor, self._reclaim, self._abdicate)

    def pin(self, holder: str) -> Pin:
        """Keep the bitmap as it is for ``holder``, but for guest writes, until the release."""
        bits = self.usable_bits()
        self._become(Pinned(bits, self.recording, holder))
        return Pin(self._release, self._pinned_bits)

    def _pinned_bits(self) -> Bits:
        self._owner.fold()
        return self._named_bits

    def pin_to_remove(self) -> Callable[[], None]:
        """Keep all others from the bitmap until what this returns is called, to remove it then."""
        self.check_removable()
        if isinstance(self._state, Inconsistent):
            return _nothing  # nobody can use it
        return self.pin("its removal").release

    def resize(self, size_bytes: int) -> None:
        """Follow the node to a new size, in every state."""
        self.version += 1
        self.gains += 1
        match self.state:
            case (
                Recording(bits=bits)
                | Stopped(bits=bits)
                | Pinned(bits=bits)
                | Inconsistent(bits=bits)
            ):
                bits.resize(size_bytes)
            case Frozen(snapshot=snapshot, successor=successor):
                snapshot.resize(size_bytes)
                successor.resize(size_bytes)
            case _ as never:
                assert_never(never)

    @property
    def _named_bits(self) -> Bits:
        match self._state:
            case (
                Recording(bits=bits)
                | Stopped(bits=bits)
                | Pinned(bits=bits)
                | Inconsistent(bits=bits)
            ):
                return bits
            case Frozen(snapshot=snapshot):
                return snapshot
            case _ as never:
                assert_never(never)

    def _usable(self) -> Recording | Stopped:
        self._check_idle()
        if isinstance(self._state, Recording | Stopped):
            return self._state
        raise BlockdError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def _check_idle(self) -> None:
        if self.busy:
            raise BlockdError(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used"
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise BlockdError(f"Bitmap '{self.name}' is readonly and cannot be modified")

    def _become(self, state: State) -> None:
        self._state = state
        self._owner.recording_changed()

    def _reclaim(self, torn: Bits | None) -> None:
        frozen = self._frozen()
        frozen.snapshot.merge(frozen.successor)
        if torn is not None:
            # As below.
            torn.resize(frozen.snapshot.size_bytes)
            frozen.snapshot.merge(torn)
            self.version += 1
            self.gains += 1
        self._become(idle(frozen.snapshot, recording=frozen.recording))

    def _abdicate(self, keep: Bits | None) -> None:
        frozen = self._frozen()
        if keep is not None:
            # The node may have been resized since ``keep`` was made.
            keep.resize(frozen.successor.size_bytes)
            frozen.successor.merge(keep)
            self.gains += 1
        self.rank = frozen.successor_rank
        self.reason = None
        self.version += 1
        self._become(idle(frozen.successor, recording=frozen.recording))

    def _frozen(self) -> Frozen:
        state = self.state
        assert isinstance(state, Frozen), "only the token of a freeze ends it"
        return state

    def _release(self) -> None:
        state = self.state
        assert isinstance(state, Pinned), "only the token of a pin ends it"
        self._become(idle(state.bits, recording=state.recording))


def _nothing() -> None:
    """Nothing is left to be done."""
