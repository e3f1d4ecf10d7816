"""The guest's user land, all in memory: busybox, the ext4 tools, and what is in this directory."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tests.guest.kernel import Kernel
from tests.helpers.tools import require_tool

HERE = Path(__file__).parent

PROGRAMS = ("busybox", "mke2fs", "e2fsck")
SCENARIOS = ("write.sh", "verify.sh")
MOUNT_POINTS = ("proc", "sys", "dev", "mnt", "tmp")
CONSOLE = (5, 1)


class Archive:
    """A cpio archive in the format "newc", as the kernel unpacks it, all of it root's.

    Described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes) -> None:
        self._add(name, stat.S_IFREG | 0o755, data)

    def character_device(self, name: str, number: tuple[int, int]) -> None:
        self._add(name, stat.S_IFCHR | 0o600, number=number)

    def to_bytes(self) -> bytes:
        self._append("TRAILER!!!", 0, b"", (0, 0))
        return bytes(self._data)

    def _add(
        self, name: str, mode: int, data: bytes = b"", number: tuple[int, int] = (0, 0)
    ) -> None:
        parent = str(PurePosixPath(name).parent)
        if parent not in {".", *self._names}:
            self.directory(parent)
        if name not in self._names:
            self._names.add(name)
            self._append(name, mode, data, number)

    def _append(self, name: str, mode: int, data: bytes, number: tuple[int, int]) -> None:
        inode = len(self._names)
        owner, links, modified, device, checksum = (0, 0), 1, 0, (0, 0), 0
        fields = (
            *(inode, mode, *owner, links, modified, len(data)),
            *(*device, *number, len(name) + 1, checksum),
        )
        header = "070701" + "".join(f"{field:08x}" for field in fields)
        for part in (f"{header}{name}\0".encode(), data):
            self._data += part
            self._data += bytes(-len(self._data) % 4)


def build_initrd(kernel: Kernel, files: Mapping[str, bytes]) -> bytes:
    """``files``: what else is to be there, by path."""
    archive = Archive()
    for name in MOUNT_POINTS:
        archive.directory(name)
    # With this the kernel gives the first process its standard input and output.
    archive.character_device("dev/console", CONSOLE)
    for module in kernel.modules:
        archive.file(f"modules/{module.name}", module.read_bytes())
    for program in PROGRAMS:
        _add_program(archive, require_tool(program))
    archive.file("init", (HERE / "init.sh").read_bytes())
    for scenario in SCENARIOS:
        archive.file(scenario, (HERE / scenario).read_bytes())
    for path, data in files.items():
        archive.file(path.removeprefix("/"), data)
    return archive.to_bytes()


def _add_program(archive: Archive, path: str) -> None:
    """A program of this machine, and the libraries that it is linked with, if it is."""
    archive.file(f"bin/{Path(path).name}", Path(path).read_bytes())
    for library in libraries_of(path):
        archive.file(library[1:], Path(library).read_bytes())


def libraries_of(*paths: str) -> list[str]:
    """What these programs and libraries are linked with, if they are."""
    command = [require_tool("ldd"), *paths]
    linked = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(dict.fromkeys(re.findall(r"/\S+(?= \(0x)", linked.stdout)))
