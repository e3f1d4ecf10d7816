"""An export: one node under one name, and every request's check against it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from blockd import limits
from blockd.bitmap import DirtyBitmap, Pin
from blockd.block import Gate, Graph, Node
from blockd.errors import BlockdError, WouldBlock
from blockd.nbd.agreement import ExportInfo
from blockd.nbd.contexts import Contexts
from blockd.nbd.wire import Cmd, CmdFlag, Headers, Request, TransmissionFlag

#: Flags that a command may carry; every one not named takes FUA alone, as QEMU does.
_ALLOWED_FLAGS = {
    Cmd.READ.value: (CmdFlag.FUA | CmdFlag.DF).value,
    Cmd.WRITE_ZEROES.value: (CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO).value,
    Cmd.BLOCK_STATUS.value: (CmdFlag.FUA | CmdFlag.REQ_ONE).value,
}
_WRITING = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
_KNOWN = frozenset({Cmd.READ, Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS, *_WRITING})
#: Commands that move data, or would have to.
_BOUNDED = frozenset({Cmd.READ, Cmd.WRITE, Cmd.CACHE})


class RequestError(Exception):
    """A request is refused before it reaches the node: ``errno`` and a sentence for the client."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number
        self.message = message


class Export:
    """A node that NBD clients may open as ``name``."""

    def __init__(
        self,
        export_id: str,
        node: Node,
        *,
        name: str,
        description: str,
        writable: bool,
        writethrough: bool,
        graph: Graph,
        bitmaps: Sequence[DirtyBitmap] = (),
        allocation_depth: bool = False,
    ) -> None:
        """``writethrough``: every write is flushed before its reply.

        ``bitmaps``: clients may ask what is dirty in them; ``allocation_depth``: and in which
        image of a chain something is. It holds the node and the bitmaps until ``release``.
        Raises ``BlockdError`` where another user forbids it.
        """
        self.id = export_id
        self.node = node
        self.name = name
        self.description = description
        self.writable = writable
        self.writethrough = writethrough
        self.shutting_down = False
        #: One cancel scope for each connection that is past its handshake.
        self.connections: set[trio.CancelScope] = set()
        self.deleted = trio.Event()
        self.multi_conn = True
        self._gate = Gate()
        self._hold = graph.hold(node, "an unnamed block device", writes=writable, follower=self)
        try:
            self._pins = _pin_all(bitmaps)
        except BlockdError:
            self._hold.release()
            raise
        named = [(bitmap.name, self._pins[bitmap]) for bitmap in bitmaps]
        self.contexts = Contexts(lambda: self.node, named, depth=allocation_depth)

    def release(self) -> None:
        """Let go of the node and the bitmaps; no client is left."""
        for pin in self._pins.values():
            pin.release()
        self._hold.release()

    # -- as a user of its node ----------------------------------------------------------------

    def quiesced(self) -> AbstractAsyncContextManager[None]:
        """The body runs with no client's write in flight, and none beginning."""
        return self._gate.shut()

    def follow(self, node: Node) -> None:
        """Serve ``node`` from now on, to the clients there are too; no write is in flight."""
        self.node = node

    @property
    def write_nowait(self) -> Callable[[int, memoryview], None]:
        """As ``Node.write_nowait``, and like that to be looked up anew for each burst."""
        return self._refuse if self._gate.closed else self.node.write_nowait

    def _refuse(self, offset: int, view: memoryview) -> None:
        raise WouldBlock

    # -- requests ------------------------------------------------------------------------------

    def info(self) -> ExportInfo:
        """What the handshake tells a client."""
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
        flags |= TransmissionFlag.SEND_CACHE
        if self.writable:
            flags |= TransmissionFlag.SEND_TRIM
            flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        else:
            flags |= TransmissionFlag.READ_ONLY
        if self.multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return ExportInfo(
            name=self.name,
            description=self.description,
            size_bytes=self.node.size_bytes,
            flags=flags,
            minimum_block_bytes=1,
            preferred_block_bytes=4096,
            maximum_block_bytes=limits.NBD_PAYLOAD_BYTES,
            contexts=self.contexts.names,
        )

    def check(
        self, request: Request, headers: Headers = Headers.SIMPLE, contexts: Collection[int] = ()
    ) -> None:
        """Check one request completely (proto.md, "Transmission phase"); then it may run.

        ``contexts``: those that a block status would tell of. Raises ``RequestError``.
        """
        flags, kind, _, offset, length = request
        # In QEMU's order, so that who is wrong in two ways hears of the same one.
        if kind in _BOUNDED and length > limits.NBD_PAYLOAD_BYTES:
            raise RequestError(
                errno.EINVAL,
                f"len ({length}) is larger than max len ({limits.NBD_PAYLOAD_BYTES})",
            )
        if kind in _WRITING and not self.writable:
            raise RequestError(errno.EPERM, "Export is read-only")
        if kind != Cmd.FLUSH and offset + length > self.node.size_bytes:
            number = errno.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else errno.EINVAL
            raise RequestError(
                number,
                f"operation past EOF; From: {offset}, Len: {length}, Size: {self.node.size_bytes}",
            )
        if flags & ~_allowed_flags(kind, headers):
            raise RequestError(
                errno.EINVAL,
                f"unsupported flags for command {_label(kind)} (got 0x{flags:x})",
            )
        if kind not in _KNOWN:
            raise RequestError(errno.EINVAL, f"invalid request type ({kind}) received")
        if kind == Cmd.BLOCK_STATUS and not contexts:
            raise RequestError(errno.EINVAL, "CMD_BLOCK_STATUS not negotiated")
        if kind == Cmd.BLOCK_STATUS and not length:
            raise RequestError(errno.EINVAL, "need non-zero length")

    def count_refused(self, request: Request) -> None:
        """Note a request that ``check`` has refused among the node's."""
        accounts = self.node.accounts
        match request.type:
            case Cmd.READ:
                accounts.read.invalid += 1
            case Cmd.WRITE | Cmd.WRITE_ZEROES:
                accounts.write.invalid += 1
            case Cmd.TRIM:
                accounts.unmap.invalid += 1
            case Cmd.FLUSH:
                accounts.flush.invalid += 1

    async def run(self, request: Request, data: memoryview) -> None:
        """Run a checked request that returns no data; ``data`` is what a WRITE brings.

        Raises ``OSError``.
        """
        if request.type == Cmd.FLUSH:
            await self.node.flush()
        elif request.length:
            await self._gate.enter()
            try:
                await self._change(request, data)
            finally:
                self._gate.leave()

    async def _change(self, request: Request, data: memoryview) -> None:
        node, offset, length = self.node, request.offset, request.length
        fua = bool(request.flags & CmdFlag.FUA) or self.writethrough
        match request.type:
            case Cmd.WRITE:
                await node.write(offset, data, fua=fua)
            case Cmd.WRITE_ZEROES:
                unmap = not request.flags & CmdFlag.NO_HOLE
                fast = request.flags & CmdFlag.FAST_ZERO
                if fast and not node.zeroes_fast(offset, length, unmap=unmap):
                    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
                await node.write_zeroes(offset, length, unmap=unmap, fua=fua)
            case Cmd.TRIM:
                await node.discard(offset, length, fua=fua)

    async def write(self, offset: int, view: memoryview) -> None:
        """Write a part of a checked request. Raises ``OSError``."""
        await self._gate.enter()
        try:
            await self.node.write(offset, view)
        finally:
            self._gate.leave()


def _allowed_flags(kind: int, headers: Headers) -> int:
    allowed = _ALLOWED_FLAGS.get(kind, CmdFlag.FUA.value)
    if kind == Cmd.READ and headers is Headers.SIMPLE:
        return allowed & ~CmdFlag.DF.value
    if kind == Cmd.WRITE and headers is Headers.EXTENDED:
        return allowed | CmdFlag.PAYLOAD_LEN.value
    return allowed


def _label(kind: int) -> str:
    """A command's name as QEMU writes it."""
    return Cmd(kind).name.lower().replace("_", " ") if kind in _KNOWN else "<unknown>"


def _pin_all(bitmaps: Sequence[DirtyBitmap]) -> dict[DirtyBitmap, Pin]:
    """Each once, or none. Raises ``BlockdError`` where one is in use."""
    pins: dict[DirtyBitmap, Pin] = {}
    try:
        for bitmap in bitmaps:
            if bitmap not in pins:
                pins[bitmap] = bitmap.pin("an NBD export")
    except BlockdError:
        for pin in pins.values():
            pin.release()
        raise
    return pins
