"""One boot of the guest: a qemu-system-x86_64 with its console on a pipe."""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from tests.guest.initrd import PROGRAMS, build_initrd
from tests.guest.kernel import find_kernel
from tests.helpers.tools import lacking, require_tool

QEMU = "qemu-system-x86_64"

#: For one line of the console: only bounds a hang. An emulated guest boots in some seconds.
PATIENCE_SECONDS = 300

#: A panic ends the machine, and with it the console. The last four save seconds of boot.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 random.trust_cpu=on tsc=reliable no_timer_check "
    "rcupdate.rcu_expedited=1"
)

Options = dict[str, Any]


class Parts(NamedTuple):
    """What every boot has in common."""

    kernel: Path
    initrd: Path

    @classmethod
    def made_in(
        cls, directory: Path, cache: Path, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Self:
        """Build the initrd, with ``files`` by their paths; the kernel is kept in ``cache``. Skips
        the test if that can't be.
        """
        if platform.machine() != "x86_64":
            lacking("the guest is x86_64, and has programs of this machine, which is not")
        for program in (QEMU, *PROGRAMS):
            require_tool(program)
        kernel = find_kernel(cache)
        initrd = directory / "initrd"
        initrd.write_bytes(build_initrd(kernel, files))
        return cls(kernel.image, initrd)


def accelerator() -> str:
    """Hardware only: nested in software, KVM is there and an ordinary kernel hangs in it."""
    hardware = any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))
    return "kvm" if hardware and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


class Guest:
    """A running guest, which ends with the ``with`` block at the latest.

    ``disk`` are the options of its disk's block node, ``log`` gets what is on its console,
    ``clock`` is what its clock says at first, half of its memory is for its user land, and the
    rest are variables of the scenario.
    """

    def __init__(
        self,
        parts: Parts,
        disk: Options,
        scenario: str,
        log: Path,
        *,
        clock: str = "utc",
        memory_mib: int = 256,
        **variables: object,
    ) -> None:
        variables["SCENARIO"] = scenario
        self._log = log
        self._unread = b""
        self._process = subprocess.Popen(
            [
                *_command(parts, disk, variables),
                *("-rtc", f"base={clock}", "-m", str(memory_mib)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def say(self, word: str) -> None:
        """Answer a scenario that waits for a word."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()

    def wait_for(self, start: str) -> str:
        """Wait for a line of the scenario that begins like this; return the rest of the line."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            line = self._next_line(deadline).removeprefix("GUEST: ")
            assert not line.startswith("exit ") or start.startswith("exit "), self._told(start)
            if line.startswith(start):
                return line.removeprefix(start).strip()

    def wait_end(self) -> None:
        """Wait until the scenario has ended well, and the machine is off."""
        assert self.wait_for("exit ") == "0", self._told("a good end")
        assert self._process.wait(PATIENCE_SECONDS) == 0, self._told("a good end")

    def _next_line(self, deadline: float) -> str:
        assert self._process.stdout is not None
        console = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = max(0, deadline - time.monotonic())
            heard, _, _ = select.select([console], [], [], left)
            piece = os.read(console, 65536) if heard else b""
            assert piece, self._told("another line")
            with self._log.open("ab") as log:
                log.write(piece)
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode(errors="replace").rstrip("\r")

    def _told(self, wanted: str) -> str:
        return f"waited for {wanted!r}, and got this:\n{self._log.read_text(errors='replace')}"


def _command(parts: Parts, disk: Options, variables: dict[str, object]) -> list[str]:
    appended = " ".join(f"{name}={value}" for name, value in variables.items())
    node = {**disk, "node-name": "disk", "discard": "unmap"}
    return [
        require_tool(QEMU),
        *("-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-machine", "q35", "-accel", accelerator(), "-cpu", "max"),
        *("-kernel", str(parts.kernel), "-initrd", str(parts.initrd)),
        *("-append", f"{COMMAND_LINE} {appended}"),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=disk"),
    ]
