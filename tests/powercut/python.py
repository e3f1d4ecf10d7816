"""A Python for the guest: this one, with the modules that the guest's program and blockd load."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.guest.initrd import libraries_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: Compiled files take an emulated guest far less time than sources. They are of no use beside
#: sources of another time, but they are beside none.
LIST_MODULES = """
import encodings.idna, runpy, sys
import blockd.daemon, tests.powercut.guest
for module in list(sys.modules.values()):
    if file := getattr(module, "__file__", None):
        print(file, getattr(module, "__cached__", None) or file, sep="\\t")
"""


def interpreter() -> str:
    """Its path, here and in the guest."""
    return str(Path(sys.executable).resolve())


def module_path() -> str:
    """For PYTHONPATH: where the modules are that are not Python's own."""
    return ":".join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))])


def python_files() -> Mapping[str, bytes]:
    """All that is to be in the guest, by path."""
    files, linked = {}, [interpreter()]
    with TemporaryDirectory(prefix="blockd-compiled-") as directory:
        for path, compiled in _modules(directory):
            if path.endswith(".so"):
                linked.append(path)
            elif compiled != path and Path(compiled).exists():
                files[f"{path}c"] = Path(compiled).read_bytes()
            else:
                files[path] = Path(path).read_bytes()
    for path in [*linked, *libraries_of(*linked)]:
        files[path] = Path(path).read_bytes()
    files["cut.sh"] = (HERE / "cut.sh").read_bytes()
    return files


def _modules(directory: str) -> list[tuple[str, str]]:
    """The paths of the modules and of their compiled forms, which are made in ``directory``.

    Those that are there already may be of older sources.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": directory}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    listed = subprocess.run(
        [sys.executable, "-c", LIST_MODULES],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = (line.split("\t") for line in listed.stdout.splitlines())
    return [(path, compiled) for path, compiled in lines]
