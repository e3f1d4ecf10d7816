"""NBD's client under load: its server is killed and started again at any time."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from random import Random

from blockd.nbd.wire import Cmd, Errno
from tests.helpers.daemon import Daemon
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_process import qemu_nbd, serving
from tests.helpers.qmp_client import QmpClient

SIZE = 1 << 20
PARTS = 16
PART_BYTES = SIZE // PARTS


class NbdReconnectTarget:
    """Each round is a batch of a guest's changes, and what the disk is then; most are undisturbed.

    A process that is killed leaves the host's cache alone: all that was answered is there.
    """

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        image = daemon.directory / "remote.img"
        image.write_bytes(bytes(SIZE))
        command = qemu_nbd(image, "--cache=unsafe")
        self._server = stack.enter_context(serving(command, daemon.directory / "remote.sock"))
        path = str(daemon.directory / "nbd.sock")
        remote = {"type": "unix", "path": str(self._server.socket_path)}
        node = {"driver": "nbd", "node-name": "disk", "server": remote, "reconnect-delay": 60}
        export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
        with QmpClient(daemon.qmp_path) as qmp:
            qmp.execute("blockdev-add", node)
            qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
            qmp.execute("block-export-add", export)
            stack.callback(end, daemon)
        self._guest = stack.enter_context(NbdClient.open(path, "disk"))
        self._model = bytearray(SIZE)
        self._calls: list[Call] = []

    def last_input(self) -> str:
        return "\n".join(str(call._replace(data=b"")) for call in self._calls)

    def play(self, random: Random) -> None:
        self._calls = [changed(random, part * PART_BYTES) for part in range(PARTS)]
        kills = random.random() < 0.05
        killer = threading.Thread(target=self._restart)
        if kills:
            killer.start()
        for result in self._guest.pipeline(self._calls, depth=PARTS):
            assert result == b"", result
        if kills:
            killer.join()
        for call in self._calls:
            self._model[call.offset : call.offset + call.length] = call.data or bytes(call.length)
        self._flush()
        assert self._guest.read(0, SIZE) == self._model

    def _restart(self) -> None:
        self._server.kill()
        self._server.start()

    def _flush(self) -> None:
        """It may fail, once: the server has been away with what it had not flushed."""
        try:
            self._guest.flush()
        except NbdError as error:
            if error.code != Errno.EIO:
                raise
            self._guest.flush()

    def settle(self, qmp: QmpClient) -> None:
        """There is nothing to take back."""


def changed(random: Random, start: int) -> Call:
    """A change within the part that begins at ``start``."""
    length = random.choice([1, 512, 4096, PART_BYTES])
    offset = start + random.randrange(PART_BYTES - length + 1)
    if random.random() < 0.2:
        return Call(Cmd.WRITE_ZEROES, offset, length)
    return Call(Cmd.WRITE, offset, length, data=random.randbytes(length))


def end(daemon: Daemon) -> None:
    """Give the node up while its server is there: the daemon's end would wait for it."""
    if daemon.running:
        with QmpClient(daemon.qmp_path) as qmp:
            qmp.execute("nbd-server-stop")
            qmp.execute("blockdev-del", {"node-name": "disk"})
