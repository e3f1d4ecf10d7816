"""Arguments of the right types that name what is not there, or is in a state that forbids it.

The names are those of ``busy_daemon``. Which member names what is read off the member's name, so
that a new command is covered where it calls things as the others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import combinations, product
from typing import Any

from msgspec import inspect

from tests.helpers.busy_daemon import JOBS
from tests.helpers.qmp_mistakes import least_object, structs

_ABORT = {"type": "abort", "data": {}}
# (The peer dies of one that enables what is not there.)
_CLEAR = {"type": "block-dirty-bitmap-clear", "data": {"node": "src", "name": "nope"}}
_BACKUP = {"type": "blockdev-backup", "data": {"device": "free", "target": "nope", "sync": "full"}}

#: Command, member, the values to try; the first line that fits counts. None leaves the member
#: out. While others are tried a member has its first value: one that is refused.
VALUES: list[tuple[str, str, list[Any]]] = [
    ("block-job-*", "device", ["nope", "", *JOBS]),
    ("*job-*", "id", ["nope", "", *JOBS]),
    ("block-job-set-speed", "speed", [-1, 0]),
    ("block_resize", "size", [-1, 0]),
    ("block-set-write-threshold", "write-threshold", [0]),
    ("*", "job-id", ["running", "", "1"]),
    # A name that is free would be taken.
    ("block-dirty-bitmap-add", "node", ["src", "nope", "", "free"]),
    ("block-dirty-bitmap-add", "name", ["idle", ""]),
    ("*dirty-bitmap*", "name", ["nope", "", "busy", "idle", "off"]),
    ("block-dirty-bitmap-merge", "target", ["nope", "", "busy", "idle"]),
    (
        "block-dirty-bitmap-merge",
        "bitmaps",
        [["nope"], ["busy"], ["idle", ""], [{"node": "src", "name": "busy"}]],
    ),
    ("block-export-add", "id", ["exp", "", "1"]),
    ("block-export-add", "bitmaps", [["nope"], ["busy"], [{"node": "src", "name": "busy"}]]),
    ("block-export-del", "id", ["nope", "", "exp"]),
    ("nbd-server-add", "name", ["exp", ""]),
    ("nbd-server-remove", "name", ["nope", "", "exp"]),
    ("*-backup", "device", ["free", "nope", "", "src", "dst"]),
    ("blockdev-backup", "target", ["spare", "nope", "", "free", "dst"]),
    ("drive-backup", "target", ["DIR/spare.img", "DIR/none/t", "DIR", "", "DIR/dst.img", "nope:t"]),
    ("object-add", "id", ["obj", "", "1"]),
    ("object-del", "id", ["nope", "", "obj"]),
    ("blockdev-add", "node-name", ["src", "", "1", "a" * 32]),
    ("blockdev-add", "filename", ["DIR/none", "DIR", "", "DIR/free.img"]),
    ("transaction", "actions", [[_ABORT], [_CLEAR], [_BACKUP], [_BACKUP, _ABORT]]),
    # A file that could be made would be.
    ("blockdev-snapshot-sync", "snapshot-file", ["DIR/none/t", "DIR", ""]),
    ("blockdev-snapshot-sync", "snapshot-node-name", ["src", None, "", "1"]),
    # It would be carried out, or what is wrong be its answer.
    ("transaction", "dry-run", [None]),
    ("*", "format", [None, "nope", "", "raw"]),
    ("*", "bitmap", [None, "nope", "", "busy", "idle"]),
    *[
        ("*", member, ["nope", "", "src", "dst", "free"])
        for member in ("node", "node-name", "device", "target", "file", "backing", "overlay")
    ],
]

#: So many members are not tried in pairs.
_MANY = 16


def wrong_names(command: str, declaration: Any) -> Iterator[dict[str, Any]]:
    """Arguments with at most two members that are not the first of their values, or one of many."""
    for struct in structs(declaration):
        base = least_object(struct)
        choices = {field.encode_name: _values(command, field) for field in struct.fields}
        base |= {name: values[0] for name, values in choices.items()}
        others = {name: values[1:] for name, values in choices.items() if values[1:]}
        for count in (0, 1, 2) if len(others) <= _MANY else (0, 1):
            for names in combinations(others, count):
                for values in product(*(others[name] for name in names)):
                    changed = base | dict(zip(names, values, strict=True))
                    yield {name: value for name, value in changed.items() if value is not None}


def _values(command: str, field: inspect.Field) -> list[Any]:
    for pattern, member, values in VALUES:
        if member == field.encode_name and fnmatchcase(command, pattern):
            return values
    values = list(_of_type(field.type))
    return values if field.required else [None, *values]


def _of_type(kind: inspect.Type) -> Iterator[Any]:
    match kind:
        case inspect.Metadata(type=inspect.IntType()):
            yield from (0, 1, 1000, (1 << 31) - 1)
        case inspect.Metadata(type=inner):
            yield from _of_type(inner)
        case inspect.UnionType(types=types):
            for each in types:
                yield from _of_type(each)
        case inspect.LiteralType(values=values):
            yield from values
        case inspect.BoolType():
            yield from (False, True)
        case inspect.StrType():
            yield "nope"
        case inspect.StructType():
            yield least_object(kind)
        case inspect.ListType(item_type=item):
            yield from ([each] for each in _of_type(item))
