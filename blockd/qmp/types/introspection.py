"""What ``query-qmp-schema`` answers: QEMU's SchemaInfo."""

from __future__ import annotations

from typing import Any, Literal

from blockd.qmp.types.base import Object


class SchemaInfo(Object, kw_only=True):
    """A command, an event or a type."""

    name: str


class SchemaBuiltin(SchemaInfo, tag_field="meta-type", tag="builtin", kw_only=True):
    """A type of JSON."""

    json_type: Literal["string", "int", "boolean", "value", "null"]


class SchemaEnumMember(Object, kw_only=True):
    """One of an enumeration's words."""

    name: str


class SchemaEnum(SchemaInfo, tag_field="meta-type", tag="enum", kw_only=True):
    """A string out of a list. ``values``: the same in an older form."""

    members: list[SchemaEnumMember]
    values: list[str]


class SchemaArray(SchemaInfo, tag_field="meta-type", tag="array", kw_only=True):
    """A list."""

    element_type: str


class SchemaObjectMember(Object, kw_only=True):
    """A member. ``default``: it may be left out; always null."""

    name: str
    type: str
    default: Any = None


class SchemaVariant(Object, kw_only=True):
    """The members that an object has, too, where its tag is ``case``."""

    case: str
    type: str


class SchemaObject(SchemaInfo, tag_field="meta-type", tag="object", kw_only=True):
    """An object. ``tag``: the member which says what ``variants`` bring."""

    members: list[SchemaObjectMember]
    tag: str | None = None
    variants: list[SchemaVariant] | None = None


class SchemaAlternateMember(Object, kw_only=True):
    """One of an alternate's types."""

    type: str


class SchemaAlternate(SchemaInfo, tag_field="meta-type", tag="alternate", kw_only=True):
    """One type or another; JSON shows which."""

    members: list[SchemaAlternateMember]


class SchemaCommand(SchemaInfo, tag_field="meta-type", tag="command", kw_only=True):
    """A command: the types of its arguments and its result."""

    arg_type: str
    ret_type: str


class SchemaEvent(SchemaInfo, tag_field="meta-type", tag="event", kw_only=True):
    """An event: the type of its data."""

    arg_type: str


SchemaEntity = (
    SchemaCommand
    | SchemaEvent
    | SchemaObject
    | SchemaAlternate
    | SchemaEnum
    | SchemaArray
    | SchemaBuiltin
)
