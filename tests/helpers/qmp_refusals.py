"""Arguments that no daemon takes, and what the peer says to each."""

from __future__ import annotations

from typing import Any

from blockd.qmp.commands import COMMANDS

_DECLARATIONS = {command.name: command.declaration for command in COMMANDS}


def declaration_of(command: str) -> Any:
    return _DECLARATIONS[command]


def missing(name: str) -> str:
    return f"Parameter '{name}' is missing"


def unexpected(name: str) -> str:
    return f"Parameter '{name}' is unexpected"


def wrong_type(name: str, expected: str) -> str:
    return f"Invalid parameter type for '{name}', expected: {expected}"


def no_value(name: str, value: str) -> str:
    return f"Parameter '{name}' does not accept value '{value}'"


def expects(name: str, c_type: str) -> str:
    return f"Parameter '{name}' expects {c_type}"


_ADD = "block-dirty-bitmap-add"
_BITMAP = {"node": "n", "name": "b"}
_SPEED = "block-job-set-speed"
_MERGE = "block-dirty-bitmap-merge"
_INTO = {"node": "n", "target": "b"}
_BACKUP = {"device": "n", "sync": "full", "target": "t"}
_START = "nbd-server-start"
_TRANSACTION = "transaction"
_ABORT: dict[str, object] = {"type": "abort", "data": {}}
_EXPORT = {"type": "nbd", "id": "e", "node-name": "n"}

_NO_OBJECT: list[object] = [5, None, [], "abort"]
_NO_STRING: list[object] = [0, True, None, [], {}]
_NO_BOOLEAN: list[object] = [0, 1, None, "true", [], {}, 1.0]
_NO_INTEGER: list[object] = ["1", 1.0, True, None, [], {}]

#: The command, its arguments, and the error. One mistake is named: the first in the order of the
#: declaration, and what is too much comes last.
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    # Members.
    (_ADD, {}, missing("node")),
    (_ADD, {"name": "b"}, missing("node")),
    (_ADD, {"node": "n"}, missing("name")),
    (_ADD, {"x": 1}, missing("node")),
    (_ADD, {"x": 1, "node": 5}, wrong_type("node", "string")),
    (_ADD, {**_BITMAP, "x": 1}, unexpected("x")),
    (_ADD, {**_BITMAP, "Node": "n"}, unexpected("Node")),
    ("query-version", {"x": None}, unexpected("x")),
    ("quit", {"": 1}, unexpected("")),
    # Types.
    *[(_ADD, {"node": wrong}, wrong_type("node", "string")) for wrong in _NO_STRING],
    *[
        (_ADD, {**_BITMAP, "disabled": wrong}, wrong_type("disabled", "boolean"))
        for wrong in _NO_BOOLEAN
    ],
    *[
        (_SPEED, {"device": "j", "speed": wrong}, wrong_type("speed", "integer"))
        for wrong in (*_NO_INTEGER, 2**63, 2**64 - 1)
    ],
    *[
        (_ADD, {**_BITMAP, "granularity": wrong}, expects("granularity", "uint64"))
        for wrong in _NO_INTEGER
    ],
    *[
        (_ADD, {**_BITMAP, "granularity": wrong}, expects("granularity", "uint32_t"))
        for wrong in (-1, 2**32, 2**63, 2**64 - 1)
    ],
    (_MERGE, {**_INTO, "bitmaps": "b"}, wrong_type("bitmaps", "array")),
    (_MERGE, {**_INTO, "bitmaps": {}}, wrong_type("bitmaps", "array")),
    # One of two types.
    *[
        (_MERGE, {**_INTO, "bitmaps": ["a", wrong]}, wrong_type("null", "BlockDirtyBitmapOrStr"))
        for wrong in (5, [None], None, True)
    ],
    (_MERGE, {**_INTO, "bitmaps": ["a", {}]}, missing("bitmaps[1].node")),
    (_MERGE, {**_INTO, "bitmaps": [{"node": "n"}]}, missing("bitmaps[0].name")),
    (
        _MERGE,
        {**_INTO, "bitmaps": [{"node": "n", "name": 5}]},
        wrong_type("bitmaps[0].name", "string"),
    ),
    (_MERGE, {**_INTO, "bitmaps": [{**_BITMAP, "x": 1}]}, unexpected("bitmaps[0].x")),
    *[
        ("blockdev-add", {"driver": "raw", "file": wrong}, wrong_type("file", "BlockdevRef"))
        for wrong in (5, None, [None])
    ],
    (
        "blockdev-add",
        {"driver": "raw", "file": {"driver": "raw", "file": 5}},
        wrong_type("file", "BlockdevRef"),
    ),
    # Names out of a list.
    ("drive-backup", {**_BACKUP, "sync": "foo"}, no_value("sync", "foo")),
    ("drive-backup", {**_BACKUP, "sync": 5}, wrong_type("sync", "string")),
    ("drive-backup", {**_BACKUP, "bitmap-mode": "x"}, no_value("bitmap-mode", "x")),
    ("drive-backup", {**_BACKUP, "on-source-error": "x"}, no_value("on-source-error", "x")),
    ("drive-backup", {**_BACKUP, "mode": ""}, no_value("mode", "")),
    ("block-export-del", {"id": "e", "mode": "soft"}, no_value("mode", "soft")),
    # What depends on another member.
    ("blockdev-add", {"node-name": "n"}, missing("driver")),
    ("blockdev-add", {"driver": 5}, wrong_type("driver", "string")),
    ("blockdev-add", {"driver": "foo"}, no_value("driver", "foo")),
    ("blockdev-add", {"driver": "raw"}, missing("file")),
    ("blockdev-add", {"driver": "raw", "discard": "x"}, no_value("discard", "x")),
    ("blockdev-add", {"driver": "file", "filename": "f", "file": "n"}, unexpected("file")),
    ("block-export-add", {"id": "e"}, missing("type")),
    ("block-export-add", {"type": "foo"}, no_value("type", "foo")),
    ("block-export-add", {**_EXPORT, "x": 1}, unexpected("x")),
    ("block-export-add", {**_EXPORT, "name": 5, "writable": 5}, wrong_type("writable", "boolean")),
    # A node's size.
    ("block_resize", {"node-name": 5}, wrong_type("node-name", "string")),
    ("block_resize", {"device": 5, "node-name": 5}, wrong_type("device", "string")),
    ("block_resize", {"node-name": "n"}, missing("size")),
    *[
        ("block_resize", {"node-name": "n", "size": wrong}, wrong_type("size", "integer"))
        for wrong in (*_NO_INTEGER, 2**63)
    ],
    # Nodes in a list.
    ("blockdev-reopen", {}, missing("options")),
    ("blockdev-reopen", {"options": {}}, wrong_type("options", "array")),
    ("blockdev-reopen", {"options": [5]}, wrong_type("options[0]", "object")),
    ("blockdev-reopen", {"options": [{}]}, missing("options[0].driver")),
    (
        "blockdev-reopen",
        {"options": [{"driver": "raw", "file": {"driver": "file"}}]},
        missing("options[0].file.filename"),
    ),
    # What becomes of a node's writes.
    ("block-set-write-threshold", {"write-threshold": 5}, missing("node-name")),
    ("block-set-write-threshold", {"node-name": "n"}, missing("write-threshold")),
    *[
        (
            "block-set-write-threshold",
            {"node-name": "n", "write-threshold": wrong},
            expects("write-threshold", "uint64"),
        )
        for wrong in (*_NO_INTEGER, 2**64)
    ],
    # Objects inside.
    ("blockdev-add", {"driver": "raw", "file": {}}, missing("file.driver")),
    ("blockdev-add", {"driver": "raw", "file": {"driver": "file"}}, missing("file.filename")),
    (
        "blockdev-add",
        {"driver": "raw", "x": 1, "file": {"driver": "file", "filename": "f", "x": 1}},
        unexpected("file.x"),
    ),
    (
        "blockdev-add",
        {"driver": "file", "filename": "f", "cache": {"direct": 5}},
        wrong_type("cache.direct", "boolean"),
    ),
    ("blockdev-add", {"driver": "file", "cache": 5}, wrong_type("cache", "object")),
    (_START, {}, missing("addr")),
    (_START, {"addr": "unix:/x"}, wrong_type("addr", "object")),
    (_START, {"addr": {}}, missing("addr.type")),
    (_START, {"addr": {"type": 5}}, wrong_type("addr.type", "string")),
    (_START, {"addr": {"type": "foo"}}, no_value("type", "foo")),
    (_START, {"addr": {"type": "unix", "path": "/x"}}, missing("addr.data")),
    (_START, {"addr": {"type": "unix", "data": {}}}, missing("addr.data.path")),
    (
        _START,
        {"addr": {"type": "inet", "data": {"host": "h", "port": 1}}},
        wrong_type("addr.data.port", "string"),
    ),
    (_START, {"max-connections": -1}, expects("max-connections", "uint32_t")),
    (_START, {"handshake-max-seconds": "1"}, expects("handshake-max-seconds", "uint64")),
    # Actions of a transaction.
    (_TRANSACTION, {}, missing("actions")),
    (_TRANSACTION, {"actions": {}}, wrong_type("actions", "array")),
    *[
        (_TRANSACTION, {"actions": [_ABORT, wrong]}, wrong_type("actions[1]", "object"))
        for wrong in _NO_OBJECT
    ],
    (_TRANSACTION, {"actions": [{"data": {}}]}, missing("actions[0].type")),
    (
        _TRANSACTION,
        {"actions": [{"type": 5, "data": {}}]},
        wrong_type("actions[0].type", "string"),
    ),
    (_TRANSACTION, {"actions": [{"type": "quit", "data": {}}]}, no_value("type", "quit")),
    (_TRANSACTION, {"actions": [_ABORT, {"type": "abort"}]}, missing("actions[1].data")),
    (
        _TRANSACTION,
        {"actions": [{"type": "abort", "data": []}]},
        wrong_type("actions[0].data", "object"),
    ),
    (
        _TRANSACTION,
        {"actions": [{"type": "abort", "data": {"x": 1}}]},
        unexpected("actions[0].data.x"),
    ),
    (_TRANSACTION, {"actions": [{**_ABORT, "x": 1}]}, unexpected("actions[0].x")),
    (
        _TRANSACTION,
        {"actions": [{"type": _ADD, "data": {"node": "n"}}]},
        missing("actions[0].data.name"),
    ),
    (
        _TRANSACTION,
        {"actions": [{"type": _MERGE, "data": {**_INTO, "bitmaps": [5]}}]},
        wrong_type("null", "BlockDirtyBitmapOrStr"),
    ),
    (
        _TRANSACTION,
        {"actions": [{"type": "blockdev-backup", "data": {**_BACKUP, "mode": "existing"}}]},
        unexpected("actions[0].data.mode"),
    ),
    (_TRANSACTION, {"actions": [], "properties": 5}, wrong_type("properties", "object")),
    (
        _TRANSACTION,
        {"actions": [], "properties": {"completion-mode": "x"}},
        no_value("completion-mode", "x"),
    ),
    (_TRANSACTION, {"actions": [], "properties": {"x": 1}}, unexpected("properties.x")),
]
