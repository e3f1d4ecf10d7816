"""The house rules that can be read off the source: who may import whom, and how long things get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Of the package, and of its tests and scripts, whose tables and stories run longer.
MAX_MODULE_LINES = 410
MAX_FILE_LINES = 510
MAX_FUNCTION_LINES = 50

#: Longer functions, each with the reason.
LONG_FUNCTIONS = {
    ("blockd.nbd.connection", "_burst"): "every call in it was measured to cost NBD's small I/O",
}

RANKS = ("values", "pure", "domain", "edges", "root")

#: The rank of a module is that of the longest prefix here.
RANK_OF = {
    "blockd": "values",
    "blockd.errors": "values",
    "blockd.extent": "values",
    "blockd.limits": "values",
    "blockd.events": "values",
    "blockd.bitmap": "pure",
    "blockd.job": "domain",
    "blockd.job.states": "pure",
    "blockd.block": "domain",
    "blockd.block.qcow2.bitmap_directory": "pure",
    "blockd.block.qcow2.compressed": "pure",
    "blockd.block.qcow2.extensions": "pure",
    "blockd.block.qcow2.features": "pure",
    "blockd.block.qcow2.header": "pure",
    "blockd.block.qcow2.image_options": "pure",
    "blockd.block.qcow2.layout": "pure",
    "blockd.block.qcow2.parsing": "pure",
    "blockd.state": "domain",
    "blockd.backup": "domain",
    "blockd.backup.plan": "pure",
    "blockd.listener": "edges",
    "blockd.objects": "domain",
    "blockd.nbd": "edges",
    "blockd.nbd.wire": "pure",
    "blockd.nbd.agreement": "pure",
    "blockd.nbd.chunks": "pure",
    "blockd.nbd.handshake": "pure",
    "blockd.nbd.options": "pure",
    "blockd.nbd.steps": "pure",
    "blockd.qmp": "edges",
    "blockd.qmp.wire": "pure",
    "blockd.qmp.arguments": "pure",
    "blockd.qmp.framing": "pure",
    "blockd.qmp.introspection": "pure",
    "blockd.qmp.session": "pure",
    "blockd.qmp.types": "pure",
    "blockd.systemd": "edges",
    "blockd.daemon": "root",
    "blockd.__main__": "root",
}

#: What each package may know of the others.
KNOWS: dict[str, set[str]] = {
    "bitmap": set(),
    "job": set(),
    "objects": set(),
    "block": {"bitmap", "objects"},
    "state": {"bitmap", "block"},
    "backup": {"bitmap", "block", "job"},
    "nbd": {"bitmap", "block"},
    "qmp": {"backup", "bitmap", "block", "job", "objects"},
}

#: Where the two edges meet: what carries the parts of both, the commands that join
#: them, and the opener of the nbd driver.
NBD_AND_QMP = {
    "blockd.qmp.services",
    "blockd.qmp.commands.export",
    "blockd.qmp.commands.openers.nbd",
}

#: Pure modules take what time and the outside world say as arguments.
NOT_IN_PURE = {
    "asyncio",
    "datetime",
    "os",
    "random",
    "select",
    "socket",
    "threading",
    "time",
    "trio",
}

#: Marks of unfinished work, and tests that hope instead of waiting.
FORBIDDEN_WORDS = re.compile(
    r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|\btime\.sleep\(|\bxfail\b"
)


@dataclass(frozen=True)
class Source:
    """One source file. ``name`` is the module's, without ``__init__``."""

    path: Path
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """The package under ``blockd``, or the module's name where it lies directly there."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def rank(self) -> int:
        return rank(self.name)

    def imports(self) -> Iterator[str]:
        """Every module that the file imports from, wherever the statement stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import"
                assert node.module is not None
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


def rank(module: str) -> int:
    prefix = module
    while prefix not in RANK_OF:
        assert "." in prefix, f"{module} has no rank"
        prefix = prefix.rpartition(".")[0]
    return RANKS.index(RANK_OF[prefix])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(directory: str) -> list[Source]:
    return [Source(path, module_name(path)) for path in sorted((ROOT / directory).rglob("*.py"))]


PACKAGE = sources("blockd")
EVERYTHING = [*PACKAGE, *sources("tests"), *sources("scripts")]
MODULES = {source.name for source in PACKAGE}
FRONTS = {source.name for source in PACKAGE if source.path.name == "__init__.py"}

each_module = pytest.mark.parametrize("source", PACKAGE, ids=lambda source: source.name)
each_file = pytest.mark.parametrize("source", EVERYTHING, ids=lambda source: source.name)


def own_imports(source: Source) -> list[str]:
    return [name for name in source.imports() if name.partition(".")[0] == "blockd"]


@each_module
def test_imports_go_down_only(source: Source) -> None:
    assert [name for name in own_imports(source) if rank(name) > source.rank] == []


@each_module
def test_values_import_nothing_of_blockd(source: Source) -> None:
    if source.rank == RANKS.index("values"):
        assert own_imports(source) == []


@each_module
def test_packages_know_only_whom_they_may(source: Source) -> None:
    known = KNOWS.get(source.package)
    if known is None:
        return
    if source.name in NBD_AND_QMP:
        known = known | {"nbd"}
    used = {name.split(".")[1] for name in own_imports(source) if "." in name}
    assert (used & KNOWS.keys()) - known - {source.package} == set()


@each_module
def test_across_packages_imports_come_from_the_front(source: Source) -> None:
    inside = [
        name
        for name in own_imports(source)
        if name.count(".") > 1 and name.split(".")[1] != source.package and name not in FRONTS
    ]
    assert inside == []


@each_module
def test_pure_modules_have_no_clock_and_no_input_or_output(source: Source) -> None:
    if source.rank == RANKS.index("pure"):
        used = {name.partition(".")[0] for name in source.imports()}
        assert used & NOT_IN_PURE == set()


@each_file
def test_files_stay_short(source: Source) -> None:
    most = MAX_MODULE_LINES if source.name in MODULES else MAX_FILE_LINES
    assert source.text.count("\n") <= most


@each_file
def test_functions_stay_short(source: Source) -> None:
    functions = (
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    long = {name for name, lines in lengths if lines > MAX_FUNCTION_LINES}
    assert long == {name for module, name in LONG_FUNCTIONS if module == source.name}


@each_file
def test_nothing_is_left_behind(source: Source) -> None:
    if source.path == Path(__file__):
        return
    lines = enumerate(source.text.splitlines(), start=1)
    assert [(number, line) for number, line in lines if FORBIDDEN_WORDS.search(line)] == []
