"""The server's end of a handshake in memory, for the tests of both ends."""

from __future__ import annotations

from blockd.nbd.agreement import ExportInfo
from blockd.nbd.handshake import Handshake
from blockd.nbd.steps import NeedData, Reply, SoftDisconnect, Step, Transmission
from blockd.nbd.wire import TransmissionFlag

GREETING = bytes.fromhex("4e42444d41474943 49484156454f5054 0003")

# What qemu-storage-daemon 10.0.2 exports, so that its answers are ours.
QEMU_FLAGS = TransmissionFlag(0xD6D)
CONTEXTS = {0: "base:allocation", 1: "qemu:allocation-depth", 2: "qemu:dirty-bitmap:b"}
DISK = ExportInfo("exp", "the descr", 1 << 20, QEMU_FLAGS, 1, 4096, 1 << 25, CONTEXTS)
PLAIN = ExportInfo(
    "", "", 2**63 - 512, TransmissionFlag.READ_ONLY, 512, 65536, 2**32 - 1, {0: CONTEXTS[0]}
)


class Directory:
    """The exports of a server."""

    def __init__(self, *exports: ExportInfo) -> None:
        self.exports = exports

    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in self.exports if export.name == name), None)

    def list(self) -> tuple[ExportInfo, ...]:
        return self.exports


class Server:
    """A server of DISK and PLAIN, as the stream of its client; ``step`` is where it stands."""

    def __init__(self) -> None:
        self.handshake = Handshake(Directory(DISK, PLAIN))
        self.received = b""
        self.sent = bytearray()
        self.step: Step
        self._work()

    def _work(self) -> None:
        while isinstance(step := self.handshake.step(), Reply):
            self.sent += step.data
        if isinstance(step, Transmission | SoftDisconnect):
            self.sent += step.reply
        self.step = step

    def sendall(self, data: bytes, /) -> None:
        self.received += data
        self.handshake.feed(data)
        self._work()

    def recv(self, size: int, /) -> bytes:
        data = bytes(self.sent[:size])
        del self.sent[:size]
        return data

    def close(self) -> None: ...


def converse(data: bytes, piece: int = 2**16) -> tuple[bytes, Step]:
    """Send ``data``, at most ``piece`` bytes each time; what the server sent, where it stands."""
    server = Server()
    for position in range(0, len(data), piece):
        if isinstance(server.step, NeedData):
            server.sendall(data[position : position + piece])
    return bytes(server.sent), server.step
