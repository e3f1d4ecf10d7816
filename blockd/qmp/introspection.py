"""The declarations as ``query-qmp-schema`` tells them, in QEMU's form (its "SchemaInfo")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from msgspec import inspect

from blockd.qmp.types.base import Nothing, Object
from blockd.qmp.types.event import Event

#: A command, an event or a type; all that a member says of another type is its name.
Entity: TypeAlias = dict[str, Any]

_BUILTINS: dict[type[inspect.Type], tuple[str, str]] = {
    inspect.StrType: ("str", "string"),
    inspect.IntType: ("int", "int"),
    inspect.BoolType: ("bool", "boolean"),
    inspect.NoneType: ("null", "null"),
    inspect.AnyType: ("any", "value"),
}


def describe(commands: Mapping[str, Any], events: Iterable[type[Event]]) -> list[Entity]:
    """Commands, events, then all types that they need, each by name.

    ``commands``: the arguments' declaration of each. One that is a union answers nothing.
    """
    types = _Types()
    calls = [
        {
            "name": name,
            "meta-type": "command",
            "arg-type": types.of(declaration),
            "ret-type": types.of(getattr(declaration, "returns", Nothing)),
        }
        for name, declaration in sorted(commands.items())
    ]
    calls += [
        {"name": event.event, "meta-type": "event", "arg-type": types.of(event)}
        for event in sorted(events, key=lambda event: event.event)
    ]
    return calls + [types.entities[name] for name in sorted(types.entities)]


class _Types:
    """The types met so far. Structs keep their names; a type without one is called by its parts."""

    def __init__(self) -> None:
        self.entities: dict[str, Entity] = {}
        self._meant: dict[str, object] = {}

    def of(self, declaration: Any) -> str:
        """The name of a type as Python spells it."""
        return self._name(inspect.type_info(declaration))

    def _name(self, kind: inspect.Type) -> str:
        match kind:
            case inspect.Metadata(type=inspect.UnionType() as union, extra_json_schema=schema):
                return self._alternate(union, (schema or {})["title"])
            case inspect.Metadata(type=inner):
                return self._name(inner)
            case inspect.UnionType(types=types):
                return self._union(types)
            case inspect.StructType():
                return self._object((kind,))
            case inspect.ListType(item_type=item):
                element = self._name(item)
                return self._add(f"[{element}]", "array", element, {"element-type": element})
            case inspect.LiteralType(values=values):
                return self._enum(tuple(map(str, values)))
            case _:
                name, json_type = _BUILTINS[type(kind)]
                return self._add(name, "builtin", json_type, {"json-type": json_type})

    def _add(self, name: str, meta_type: str, meant: object, rest: Entity) -> str:
        """Note a type. Its ``name`` stands for nothing but what is ``meant``."""
        assert self._meant.setdefault(name, meant) == meant, f"two types are called {name}"
        self.entities.setdefault(name, {"name": name, "meta-type": meta_type, **rest})
        return name

    def _enum(self, values: tuple[str, ...]) -> str:
        words = {"members": [{"name": value} for value in values], "values": list(values)}
        return self._add("|".join(values), "enum", values, words)

    def _union(self, types: Iterable[inspect.Type]) -> str:
        """Of objects that a tag tells apart, or of one type with None, for it may be left out."""
        present = [kind for kind in types if not isinstance(kind, inspect.NoneType)]
        structs = tuple(kind for kind in present if isinstance(kind, inspect.StructType))
        if structs:
            return self._object(structs)
        (one,) = present
        return self._name(one)

    def _alternate(self, union: inspect.UnionType, title: str) -> str:
        if title not in self.entities:
            choices: list[Entity] = []
            # Noted before its types are, for they may have members of this one.
            self._add(title, "alternate", union, {"members": choices})
            plain = [kind for kind in union.types if not isinstance(kind, inspect.StructType)]
            structs = tuple(kind for kind in union.types if isinstance(kind, inspect.StructType))
            choices += [{"type": self._name(kind)} for kind in plain]
            choices.append({"type": self._object(structs)})
        return title

    def _object(self, structs: tuple[inspect.StructType, ...]) -> str:
        if structs[0].tag_field is None:
            (struct,) = structs
            return self._plain_object(struct, struct.fields)
        return self._tagged_object(_common_base(structs), structs)

    def _plain_object(self, struct: inspect.StructType, fields: tuple[inspect.Field, ...]) -> str:
        name = struct.cls.__name__
        known = name in self.entities
        members: list[Entity] = []
        self._add(name, "object", struct.cls, {"members": members})
        if not known:
            members += [self._member(field) for field in fields]
        return name

    def _tagged_object(self, base: Any, structs: tuple[inspect.StructType, ...]) -> str:
        """All have the members of ``base``; those of its own are each one's variant."""
        name: str = base.__name__
        known = name in self.entities
        tag, cases = structs[0].tag_field, tuple(str(struct.tag) for struct in structs)
        members: list[Entity] = []
        variants: list[Entity] = []
        rest = {"members": members, "tag": tag, "variants": variants}
        self._add(name, "object", (base, cases), rest)
        if not known:
            common = set(base.__struct_fields__)
            members.append({"name": tag, "type": self._enum(cases)})
            members += [self._member(field) for field in structs[0].fields if field.name in common]
            for case, struct in zip(cases, structs, strict=True):
                own = tuple(field for field in struct.fields if field.name not in common)
                variants.append({"case": case, "type": self._plain_object(struct, own)})
        return name

    def _member(self, field: inspect.Field) -> Entity:
        member = {"name": field.encode_name, "type": self._name(field.type)}
        return member if field.required else {**member, "default": None}


def _common_base(structs: tuple[inspect.StructType, ...]) -> Any:
    """The class that a union of tagged structs goes by: the nearest that all of them have."""
    base: Any = next(
        each
        for each in structs[0].cls.__mro__
        if all(issubclass(struct.cls, each) for struct in structs) and not _is_tagged(each)
    )
    assert base is not Object, f"{structs[0].cls} needs a base to be called by"
    return base


def _is_tagged(struct: Any) -> bool:
    return struct.__struct_config__.tag is not None
