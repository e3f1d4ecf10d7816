"""qcow2 images with bitmaps whose numbers were changed, for a daemon to open and use."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

from tests.helpers.daemon import Daemon
from tests.helpers.qcow2 import options, qemu_img, qemu_io
from tests.helpers.qmp_client import QmpClient, QmpError

IMAGE = "image"
DISK_BYTES = 1 << 20
WORD_BYTES = 8
#: Cluster sizes of the images.
CLUSTERS = ["512", "4k", "64k"]


def make_image(path: Path, cluster: str) -> bytes:
    """With data, and bitmaps of all kinds: fine and coarse, recording or not, dirty or clean."""
    qemu_img("create", "-f", "qcow2", *options(f"cluster_size={cluster}"), path, str(DISK_BYTES))
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "-g", "64k", path, "all")
    qemu_io(path, "write 100k 1k", "write -z 200k 64k", "discard 0 1M", "write 300k 4k")
    qemu_img("bitmap", "--add", "--disable", path, "clean")
    return path.read_bytes()


class Qcow2Target:
    """Each round is one damaged image: opened, looked at, written to in its bitmaps, closed."""

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        self._path = daemon.qmp_path.parent / IMAGE
        # One for all rounds, so that none is counted that is just leaving.
        self._client = stack.enter_context(QmpClient(daemon.qmp_path))
        self._images = [make_image(self._path, cluster) for cluster in CLUSTERS]
        self._changes: list[tuple[int, int]] = []

    def play(self, random: Random) -> None:
        image = bytearray(random.choice(self._images))
        self._changes = [change(image, random) for _ in range(random.randint(1, 4))]
        self._path.write_bytes(image)
        with suppress(QmpError):
            self._use(random)
        with suppress(QmpError):
            self._client.execute("blockdev-del", {"node-name": "n"})

    def _use(self, random: Random) -> None:
        client = self._client
        image = {"driver": "file", "filename": IMAGE}
        read_only = random.random() < 0.2
        node = {"driver": "qcow2", "node-name": "n", "read-only": read_only, "file": image}
        client.execute("blockdev-add", {**node, "cache": {"no-flush": True}})
        (top, _) = client.execute("query-named-block-nodes")
        for bitmap in top.get("dirty-bitmaps", []):
            for command in ("x-debug-block-dirty-bitmap-sha256", "block-dirty-bitmap-clear"):
                with suppress(QmpError):
                    client.execute(command, {"node": "n", "name": bitmap["name"]})
        new = {"node": "n", "name": "new", "persistent": True}
        client.execute("block-dirty-bitmap-add", new)
        client.execute("block-dirty-bitmap-remove", {"node": "n", "name": "fine"})
        client.execute("block_resize", {"node-name": "n", "size": 2 * DISK_BYTES})

    def settle(self, qmp: QmpClient) -> None:
        """Each round has taken back what it brought about."""

    def last_input(self) -> str:
        return "".join(f"at {at:#x}: {number:#x}\n" for at, number in self._changes)


def change(image: bytearray, random: Random) -> tuple[int, int]:
    """Put another number in the place of one that is not 0; where, and which."""
    # All that describes the data; the data itself is 0xcd.
    words = [
        at
        for at in range(0, len(image), WORD_BYTES)
        if any(image[at : at + WORD_BYTES]) and image[at : at + WORD_BYTES] != b"\xcd" * WORD_BYTES
    ]
    at = random.choice(words)
    before = int.from_bytes(image[at : at + WORD_BYTES])
    number = random.choice(
        [
            before ^ 1 << random.randrange(64),
            random.getrandbits(64),
            random.randrange(0, len(image), 512),
            before + random.choice([-512, -1, 1, 512]),
            before | 0xFFFFFFFF,
            0,
        ]
    ) % (1 << 64)
    image[at : at + WORD_BYTES] = number.to_bytes(WORD_BYTES)
    return at, number
