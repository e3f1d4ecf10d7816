"""Arguments of commands, made from their declarations: the least that is taken, and every mistake.

What is here knows no command by name, so that a new one is covered as soon as it is declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import inspect

#: JSON of every type, for a member that takes another one.
_VALUES: list[Any] = [None, True, 5, 1.5, "x", [], {}]
_NEVER = "no-such-word"
_UNSIGNED_BITS = {"uint8_t": 8, "uint16_t": 16, "uint32_t": 32, "uint64": 64}


@dataclass(frozen=True)
class Mistake:
    """Arguments that no daemon takes; ``what`` is wrong with them."""

    what: str
    arguments: dict[str, Any]


def structs(declaration: Any) -> tuple[inspect.StructType, ...]:
    """The objects that a command's arguments may be, which a tag tells apart."""
    return _structs(inspect.type_info(declaration))


def least(declaration: Any) -> dict[str, Any]:
    """The least that a command takes; names in it are names of nothing."""
    return least_object(structs(declaration)[0])


def least_object(struct: inspect.StructType) -> dict[str, Any]:
    """The least that is an object of this type."""
    sent: dict[str, Any] = {} if struct.tag_field is None else {struct.tag_field: struct.tag}
    return sent | {
        # A file must not be made where the tests run.
        field.encode_name: "DIR/none/t" if field.name == "filename" else _least(field.type)
        for field in struct.fields
        if field.required
    }


def mistakes(declaration: Any) -> Iterator[Mistake]:
    """Every argument missing, of each wrong type, out of range, and one too many, at any depth."""
    for what, arguments in _wrong_objects(structs(declaration), ()):
        yield Mistake(what, arguments)


def _structs(kind: inspect.Type) -> tuple[inspect.StructType, ...]:
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return tuple(each for each in kinds if isinstance(each, inspect.StructType))


def _least(kind: inspect.Type) -> Any:
    match kind:
        case inspect.Metadata(type=inner):
            return _least(inner)
        case inspect.UnionType(types=types):
            return _least(next((each for each in types if _is_string(each)), types[0]))
        case inspect.StructType():
            return least_object(kind)
        case inspect.ListType(item_type=item):
            return [_least(item)]
        case inspect.LiteralType(values=(first, *_)):
            return first
        case inspect.StrType():
            return "nope"
        case inspect.IntType():
            return 1
        case inspect.BoolType():
            return False
    raise AssertionError(kind)


def _is_string(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.StrType)


def _is_none(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.NoneType)


#: What is wrong, and the value that is.
_Wrong = Iterator[tuple[str, Any]]


def _wrong_objects(kinds: tuple[inspect.StructType, ...], above: tuple[type, ...]) -> _Wrong:
    tag_field = kinds[0].tag_field
    if tag_field is not None:
        rest = {name: value for name, value in least_object(kinds[0]).items() if name != tag_field}
        yield f"no {tag_field}", rest
        for value in (None, 5, _NEVER):
            yield f"{tag_field}: {value}", {**rest, tag_field: value}
    for kind in _not_again(kinds, above):
        for what, value in _wrong_members(kind, (*above, kind.cls)):
            yield (what if kind.tag is None else f"{kind.tag}: {what}"), value


def _not_again(
    kinds: tuple[inspect.StructType, ...], above: tuple[type, ...]
) -> tuple[inspect.StructType, ...]:
    """Of objects that may hold one another, one more that holds none, and then no more."""
    met = [kind for kind in kinds if kind.cls in above]
    if not met:
        return kinds
    if len(above) > 1:
        return ()
    others = (kind for kind in kinds if kind.cls not in above)
    return tuple(sorted(others, key=lambda kind: len(kind.fields))[:1])


def _wrong_members(kind: inspect.StructType, above: tuple[type, ...]) -> _Wrong:
    good = least_object(kind)
    for name in good:
        if name != kind.tag_field:
            yield f"no {name}", {key: value for key, value in good.items() if key != name}
    yield "x-y unexpected", {**good, "x-y": 1}
    for field in kind.fields:
        for what, value in _wrong_values(field.type, above):
            yield f"{field.encode_name}: {what}", {**good, field.encode_name: value}
    # Of several mistakes, the first in the declaration's order is named.
    names = [field.encode_name for field in kind.fields]
    for first in range(len(names) - 1):
        wrong = dict.fromkeys(reversed(names[first:]))
        yield f"all wrong from {names[first]} on", {"x-y": 1, **good, **wrong}


def _wrong_values(kind: inspect.Type, above: tuple[type, ...]) -> _Wrong:
    match kind:
        case inspect.Metadata(type=inspect.UnionType() as union):
            null = [type(None)] if any(map(_is_none, union.types)) else []
            yield from _others(str, dict, *null)
            yield from _wrong_objects(_structs(union), above)
        case inspect.Metadata(type=inspect.IntType(), extra=extra):
            yield from _others(int)
            yield from _out_of_range((extra or {})["c_type"])
        case inspect.Metadata(type=inner):
            yield from _wrong_values(inner, above)
        case inspect.UnionType() if found := _structs(kind):
            yield from _others(dict)
            yield from _wrong_objects(found, above)
        case inspect.UnionType(types=types):
            yield from _wrong_values(next(each for each in types if not _is_none(each)), above)
        case inspect.StructType():
            yield from _others(dict)
            yield from _wrong_objects((kind,), above)
        case inspect.ListType(item_type=item):
            yield from _others(list)
            for what, value in _wrong_values(item, above):
                yield f"second of list: {what}", [_least(item), value]
        case _:
            yield from _wrong_scalars(kind)


def _wrong_scalars(kind: inspect.Type) -> _Wrong:
    match kind:
        case inspect.LiteralType():
            yield from _others(str)
            for word in (_NEVER, ""):
                yield f"'{word}'", word
        case inspect.StrType():
            yield from _others(str)
        case inspect.BoolType():
            yield from _others(bool)
        case _:
            raise AssertionError(kind)


def _others(*right: type) -> _Wrong:
    for value in _VALUES:
        if type(value) not in right:
            yield repr(value), value


def _out_of_range(c_type: str) -> _Wrong:
    if c_type == "int64":
        outside = [-(1 << 63) - 1, 1 << 63, 1 << 64]
    elif c_type == "size":
        # A negative one is read, and refused or not by what it is for.
        outside = [-(1 << 63) - 1, 1 << 64]
    else:
        outside = [-1, -(1 << 63) - 1, 1 << _UNSIGNED_BITS[c_type], 1 << 64]
    for value in outside:
        yield str(value), value
