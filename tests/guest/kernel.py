"""A Linux kernel for the guest: a Debian cloud kernel that is installed, or else apt's."""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.helpers.tools import lacking, require_tool

PACKAGE = "linux-image-cloud-amd64"

#: What the guest needs; those that this kernel has built in are no files.
MODULES = ("virtio_pci", "virtio_blk", "ext4")


@dataclass(frozen=True)
class Kernel:
    """``modules`` are in an order in which they can be inserted one by one."""

    image: Path
    modules: list[Path]

    @classmethod
    def kept_in(cls, directory: Path) -> Self:
        return cls(directory / "vmlinuz", sorted(directory.glob("*.ko")))


def find_kernel(cache: Path) -> Kernel:
    """The kernel, from ``cache`` if a run before this one has put it there."""
    kept = cache / "kernel"
    with open(cache / "kernel.lock", "w") as lock:
        # Tests in another process may be looking for it too; closing the file unlocks it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _find_and_keep(kept)
    return Kernel.kept_in(kept)


def _find_and_keep(kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
        root = Path("/")
        version = _installed_version() or _fetch(root := Path(directory))
        made = Path(directory) / "made"
        made.mkdir()
        _keep(root, version, made)
        # All or nothing, whatever interrupts this.
        made.rename(kept)


def _installed_version() -> str | None:
    for image in Path("/boot").glob("vmlinuz-*-cloud-amd64"):
        version = image.name.removeprefix("vmlinuz-")
        if os.access(image, os.R_OK) and _module_files(Path("/"), version):
            return version
    return None


def _fetch(root: Path) -> str:
    """Unpack apt's newest kernel under ``root``; its version. Nothing is installed."""
    for tool in ("apt-cache", "apt-get", "dpkg-deb"):
        require_tool(tool)
    depends = _run("apt-cache", "depends", PACKAGE, directory=root)
    match = re.search(r"Depends: (linux-image-\d\S+)", depends)
    if match is None:
        lacking(f"no Debian cloud kernel is installed, and apt does not know {PACKAGE}")
    _run("apt-get", "download", match[1], directory=root)
    (package,) = root.glob("*.deb")
    _run("dpkg-deb", "--extract", str(package), ".", directory=root)
    (image,) = root.glob("boot/vmlinuz-*")
    return image.name.removeprefix("vmlinuz-")


def _run(*command: str, directory: Path) -> str:
    """What the command prints. If it fails there is no kernel to be had here."""
    result = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lacking(f"no kernel for the guest: {' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def _keep(root: Path, version: str, directory: Path) -> None:
    """Copy the image, and the modules in the order in which they are to be inserted."""
    image = root / "boot" / f"vmlinuz-{version}"
    (directory / "vmlinuz").write_bytes(image.read_bytes())
    files = _module_files(root, version)
    wanted = dict.fromkeys(name for module in MODULES for name in _with_needs(module, files))
    for number, name in enumerate(wanted):
        (directory / f"{number:02}-{name}.ko").write_bytes(_module_bytes(files[name]))


def _module_files(root: Path, version: str) -> dict[str, Path]:
    """By module name. The package has no list of them before its installation makes one."""
    return {
        path.name.split(".")[0].replace("-", "_"): path
        for place in ("lib", "usr/lib")
        for path in (root / place / "modules" / version).rglob("*.ko*")
    }


def _with_needs(module: str, files: dict[str, Path]) -> Iterator[str]:
    """The module's name after those of the modules that it needs."""
    if module in files:
        match = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(files[module]))
        for need in match[1].decode().split(",") if match else []:
            yield from _with_needs(need, files)
        yield module


def _module_bytes(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
