"""The peer's own words for arguments that it can't take, and its own declarations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from msgspec import inspect

from blockd.qmp.commands import COMMANDS
from blockd.qmp.types.base import Nothing
from blockd.qmp.types.event import EVENTS
from tests.helpers.peer import Peer
from tests.helpers.qmp_client import QmpClient, QmpError
from tests.helpers.qmp_refusals import REFUSALS

#: Commands, events, kinds of jobs and members that the peer does not have; all members of these may
#: be left out.
OURS_ALONE = {
    # What a transaction would do, without doing it.
    "transaction.dry-run",
    "transaction.actions",
    # Bitmaps that outlive the daemon: whether they can be relied on, and why they are dirty.
    "x-blockd-audit",
    "BLOCK_DIRTY_BITMAPS_UNSAFE",
    "BLOCK_DIRTY_BITMAPS_SAFE",
    "BLOCK_DIRTY_BITMAP_RECOVERED",
    "query-named-block-nodes[].dirty-bitmaps[].reason",
}

#: A type of the peer's introspection ("SchemaInfo").
Info: TypeAlias = dict[str, Any]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[QmpClient]:
    program = Peer(tmp_path)
    with QmpClient(program.start()) as client:
        yield client
    program.kill()


def test_the_peer_says_the_same(peer: QmpClient) -> None:
    for command, arguments, error in REFUSALS:
        with pytest.raises(QmpError) as refused:
            peer.execute(command, arguments)
        assert (refused.value.error_class, refused.value.description) == ("GenericError", error)


class Schema:
    """The peer's answer to ``query-qmp-schema``."""

    def __init__(self, entries: list[Info]) -> None:
        self._types = {entry["name"]: entry for entry in entries}

    def arguments(self, call: str) -> Info:
        """Of a command, or the data of an event."""
        return self[self._types[call]["arg-type"]]

    def result(self, command: str) -> Info:
        return self[self._types[command]["ret-type"]]

    def __getitem__(self, name: str) -> Info:
        info: Info = self._types[name]
        return info

    def members(self, info: Info, tag: object) -> dict[str, Info]:
        """The members of an object, with those that the tag brings."""
        members = {member["name"]: member for member in info["members"]}
        for variant in info.get("variants", []):
            if variant["case"] == tag:
                members |= self.members(self[variant["type"]], None)
        return members


def test_arguments_are_the_peers(peer: QmpClient) -> None:
    """Each has the peer's name and type, and may be left out where the peer's may."""
    comparison = Comparison(Schema(peer.execute("query-qmp-schema")))
    for command in COMMANDS:
        if command.name in OURS_ALONE:
            continue
        kind = inspect.type_info(command.declaration)
        comparison.check(kind, comparison.schema.arguments(command.name), command.name)


def test_results_and_events_are_the_peers(peer: QmpClient) -> None:
    """What may be absent there may be absent here; what never is there, never is here."""
    comparison = Comparison(Schema(peer.execute("query-qmp-schema")))
    for command in COMMANDS:
        if command.name in OURS_ALONE:
            continue
        kind = inspect.type_info(getattr(command.declaration, "returns", Nothing))
        comparison.check(kind, comparison.schema.result(command.name), command.name)
    for event in EVENTS:
        if event.event in OURS_ALONE:
            continue
        info = comparison.schema.arguments(event.event)
        comparison.check(inspect.type_info(event), info, event.event)


class Comparison:
    """Our declarations beside the peer's; ``where`` says which member an assertion is about."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        #: Objects that were begun with, and beside what: definitions of nodes hold others.
        self._seen: set[tuple[type, int]] = set()

    def check(self, kind: inspect.Type, info: Info, where: str) -> None:
        match kind:
            case inspect.Metadata(type=inner):
                self.check(inner, info, where)
            case inspect.UnionType(types=types):
                for each in types:
                    if not isinstance(each, inspect.NoneType):
                        self.check(each, info, where)
            case inspect.StructType(cls=cls) if (cls, id(info)) not in self._seen:
                self._seen.add((cls, id(info)))
                self._check_object(kind, info, where)
            case inspect.ListType(item_type=item):
                self.check(item, self.schema[info["element-type"]], f"{where}[]")
            case inspect.LiteralType(values=values):
                assert set(values) - OURS_ALONE <= self._words(info), where
            case inspect.StrType():
                assert "string" in self._json_types(info), where
            case inspect.IntType():
                assert "int" in self._json_types(info), where
            case inspect.BoolType():
                assert "boolean" in self._json_types(info), where

    def _check_object(self, kind: inspect.StructType, info: Info, where: str) -> None:
        if info["meta-type"] == "alternate":
            choices = (self.schema[member["type"]] for member in info["members"])
            info = next(each for each in choices if each["meta-type"] == "object")
        theirs = self.schema.members(info, kind.tag)
        for field in kind.fields:
            place = f"{where}.{field.encode_name}"
            if place in OURS_ALONE and field.encode_name not in theirs:
                assert not field.required, place
                continue
            assert field.encode_name in theirs, place
            member = theirs[field.encode_name]
            assert field.required == ("default" not in member), place
            self.check(field.type, self.schema[member["type"]], place)

    def _words(self, info: Info) -> set[str]:
        """Those of an enum, or of an alternate's."""
        if info["meta-type"] == "enum":
            return {member["name"] for member in info["members"]}
        choices = (self.schema[member["type"]] for member in info["members"])
        return next(self._words(each) for each in choices if each["meta-type"] == "enum")

    def _json_types(self, info: Info) -> set[str]:
        """The plain types of JSON that a value may have."""
        if info["meta-type"] != "alternate":
            return {info["json-type"]} if info["meta-type"] == "builtin" else set()
        choices = (self.schema[member["type"]] for member in info["members"])
        return set().union(*map(self._json_types, choices))
