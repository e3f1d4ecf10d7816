"""What the host says of this boot, and the note of when a daemon was last alive."""

from __future__ import annotations

import struct
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockd.state.disk import Disk

_NAME = "heartbeat"
_BEAT = struct.Struct("<QI")


@dataclass(frozen=True, slots=True)
class Boot:
    """Which boot this is, and when it was, by the wall clock."""

    boot_id: str
    time_ns: int


def this_boot() -> Boot:
    """Raises ``OSError``."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return Boot(boot_id, int(line.split()[1]) * 10**9)
    return Boot(boot_id, 0)


class Heartbeat:
    """The time in a file, in the page cache: for whoever comes after a kill."""

    def __init__(self, disk: Disk) -> None:
        """Raises ``OSError``."""
        self._disk = disk
        #: When a daemon before this one was last alive; 0 where that is not known.
        self.last_ns = self._read()
        self._fd = disk.create(_NAME, _BEAT.size)
        self.note(self.last_ns)

    def _read(self) -> int:
        try:
            fd = self._disk.open(_NAME)
        except OSError:
            return 0
        try:
            time_ns, total = _BEAT.unpack(self._disk.read(fd, _BEAT.size, 0))
        except (OSError, struct.error):
            return 0
        finally:
            self._disk.close(fd)
        return time_ns if total == zlib.crc32(time_ns.to_bytes(8, "little")) else 0

    def beat(self) -> None:
        """Note that the daemon is alive. A microsecond; what goes wrong errs to "dead"."""
        with suppress(OSError):
            self.note(time.time_ns())

    def note(self, time_ns: int) -> None:
        total = zlib.crc32(time_ns.to_bytes(8, "little"))
        self._disk.write(self._fd, _BEAT.pack(time_ns, total), 0)

    def end(self) -> None:
        """Let go of the file."""
        self._disk.close(self._fd)
