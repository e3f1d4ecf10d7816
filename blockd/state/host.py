"""What the host says of this boot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
