"""NBD's server: what clients send, with bytes changed, lost, doubled and cut off anywhere."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from random import Random
from select import select

from blockd.nbd import wire
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_beside_qemu import add_disk, serve_disk
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import option_bytes, request_bytes
from tests.helpers.nbd_programs import DISK_BYTES, EXPORT, haggling, program
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.qmp_client import QmpClient

#: Numbers for the fields of 2, 4 and 8 bytes that messages consist of.
NUMBERS = [0, 1, 2, 511, 4096, DISK_BYTES, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
#: What one client sends at most; its replies are not much longer than what they answer.
SENT_MAX_BYTES = 1 << 20


def damaged(random: Random, data: bytes) -> bytes:
    """``data`` with a few bytes wrong."""
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        at = random.randrange(len(data) + 1)
        end = min(at + random.choice([1, 2, 4, 8, 30]), len(data))
        number = random.choice(NUMBERS).to_bytes(8)[-(end - at) :] if end > at else b""
        data = random.choice(
            [
                data[:at] + number + data[end:],
                data[:at] + random.randbytes(end - at) + data[end:],
                data[:at] + data[end:],
                data[:end] + data[at:],
                data[:at],
            ]
        )
    return data


def conversation(random: Random) -> bytes:
    """All that a client says, whatever it is answered."""
    entering = random.random() < 0.7
    asked = program(random) if entering else None
    options = asked.haggling.options if asked else haggling(random).options
    said = wire.CLIENT_FLAGS.pack(3) + b"".join(option_bytes(*option) for option in options)
    if asked:
        extended = asked.headers is wire.Headers.EXTENDED
        for cookie, call in enumerate(asked.calls):
            said += request_bytes(call, cookie, extended=extended)
    return damaged(random, said)[:SENT_MAX_BYTES]


class NbdServerTarget:
    """Each round is one client that says something, hears it out, and goes; and a good one."""

    def __init__(self, daemon: Daemon, _: ExitStack) -> None:
        image = daemon.directory / "disk.img"
        image.write_bytes(bytes(DISK_BYTES))
        self._path = str(daemon.directory / "nbd.sock")
        self._said = b""
        with QmpClient(daemon.qmp_path) as qmp:
            add_disk(qmp, image)
            serve_disk(qmp, self._path)

    def last_input(self) -> str:
        return self._said.hex()

    def play(self, random: Random) -> None:
        self._said = conversation(random)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(self._path)
            say(client, self._said, random)
        with NbdClient.open(self._path, EXPORT) as good:
            data = random.randbytes(512)
            good.write(0, data)
            assert good.read(0, 512) == data

    def settle(self, qmp: QmpClient) -> None:
        """Whoever still seems to be connected would be counted."""
        serve_disk(qmp, self._path)


def say(client: socket.socket, data: bytes, random: Random) -> None:
    """Send, and take what comes, until both have nothing more to say; or go without a word."""
    try:
        while data:
            readable, writable, _ = select([client], [client], [], PATIENCE_SECONDS)
            if not readable and not writable:
                raise TimeoutError
            if readable and not client.recv(1 << 16):
                return
            if writable:
                data = data[client.send(data[: random.choice([1, 20, 5000, 1 << 16])]) :]
        if random.random() < 0.8:
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
    except ConnectionError:
        pass
