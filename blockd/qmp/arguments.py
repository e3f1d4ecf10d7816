"""Checks what a client sent against a declaration, in QEMU's words.

QEMU looks at an object's members in the order of the declaration and then for members too many,
and stops at the first mistake. What passes here, ``msgspec.convert`` takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from blockd.errors import BlockdError

#: Of the unsigned ones with fewer bits than 64.
_UNSIGNED_END = {"uint16_t": 1 << 16, "uint32_t": 1 << 32}


def parse(declaration: Any, value: dict[str, Any]) -> Any:
    """The arguments as ``declaration`` (a Struct, or a union of tagged ones) has them.

    Raises ``BlockdError``.
    """
    _check_object(_structs(_type_info(declaration)), value, "")
    return msgspec.convert(value, declaration)


@cache
def _type_info(declaration: Any) -> inspect.Type:
    return inspect.type_info(declaration)


def _structs(kind: inspect.Type) -> tuple[inspect.StructType, ...]:
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return tuple(member for member in members if isinstance(member, inspect.StructType))


def _check_object(kinds: tuple[inspect.StructType, ...], value: Any, path: str) -> None:
    """Check an object that is one of ``kinds``, which a tag tells apart."""
    if not isinstance(value, dict):
        raise _wrong_type(path, "object")
    before_tag = getattr(kinds[0].cls, "before_tag", ())
    _check_members((each for each in kinds[0].fields if each.name in before_tag), value, path)
    kind = _chosen(kinds, value, path)
    _check_members(kind.fields, value, path)
    known = {field.encode_name for field in kind.fields} | {kind.tag_field}
    for member in value:
        if member not in known:
            raise BlockdError(f"Parameter '{_join(path, member)}' is unexpected")


def _check_members(fields: Iterable[inspect.Field], value: dict[str, Any], path: str) -> None:
    for field in fields:
        name = _join(path, field.encode_name)
        if field.encode_name in value:
            _check(field.type, value[field.encode_name], name)
        elif field.required:
            raise BlockdError(f"Parameter '{name}' is missing")


def _chosen(
    kinds: tuple[inspect.StructType, ...], value: dict[str, Any], path: str
) -> inspect.StructType:
    tag_field = kinds[0].tag_field
    if tag_field is None:
        return kinds[0]
    name = _join(path, tag_field)
    if tag_field not in value:
        raise BlockdError(f"Parameter '{name}' is missing")
    tag = value[tag_field]
    _check_choice([kind.tag for kind in kinds], tag, name)
    return next(kind for kind in kinds if kind.tag == tag)


def _check(kind: inspect.Type, value: Any, name: str) -> None:
    match kind:
        case inspect.Metadata(type=inspect.UnionType() as union, extra_json_schema=schema):
            _check_alternate(union, value, name, (schema or {})["title"])
        case inspect.Metadata(type=inspect.IntType(), extra=extra):
            _check_integer(value, name, (extra or {})["c_type"])
        case inspect.UnionType() if structs := _structs(kind):
            _check_object(structs, value, name)
        case inspect.UnionType(types=types):
            # An optional member; its None is never sent.
            _check(next(each for each in types if not _is_none(each)), value, name)
        case inspect.StructType():
            _check_object((kind,), value, name)
        case inspect.ListType(item_type=item_type):
            _check_list(item_type, value, name)
        case inspect.LiteralType(values=values):
            _check_choice(values, value, name)
        case inspect.StrType() | inspect.Metadata(type=inspect.StrType()):
            if not isinstance(value, str):
                raise _wrong_type(name, "string")
        case inspect.BoolType():
            if not isinstance(value, bool):
                raise _wrong_type(name, "boolean")
        case _:
            raise AssertionError(f"no declaration has a member like '{name}': {kind}")


def _check_alternate(union: inspect.UnionType, value: Any, name: str, title: str) -> None:
    words = next((each for each in union.types if isinstance(each, inspect.LiteralType)), None)
    if isinstance(value, dict):
        _check_object(_structs(union), value, name)
    elif isinstance(value, str) and words is not None:
        _check_choice(words.values, value, name)
    elif not isinstance(value, str) and not (value is None and any(map(_is_none, union.types))):
        raise _wrong_type(_short(name), title)


def _check_list(item_type: inspect.Type, value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise _wrong_type(name, "array")
    for index, item in enumerate(value):
        _check(item_type, item, f"{name}[{index}]")


def _check_choice(choices: Iterable[Any], value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise _wrong_type(name, "string")
    if value not in choices:
        raise BlockdError(f"Parameter '{_short(name)}' does not accept value '{value}'")


def _check_integer(value: Any, name: str, c_type: str) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if c_type == "int64":
        if not (is_integer and -(1 << 63) <= value < 1 << 63):
            raise _wrong_type(name, "integer")
        return
    # QEMU reads every unsigned one with 64 bits first, in which -1 is a large number; of one
    # that has them all, that number is of no use to anybody.
    least = 0 if c_type == "uint64" else -(1 << 63)
    if not (is_integer and least <= value < 1 << 64):
        raise BlockdError(f"Parameter '{name}' expects uint64")
    if c_type in _UNSIGNED_END and not 0 <= value < _UNSIGNED_END[c_type]:
        raise BlockdError(f"Parameter '{_short(name)}' expects {c_type}")


def _is_none(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.NoneType)


def _join(path: str, member: str) -> str:
    return f"{path}.{member}" if path else member


def _short(name: str) -> str:
    """What QEMU calls a member in some of its sentences; an array's item has no name there."""
    return "null" if name.endswith("]") else name.rpartition(".")[2]


def _wrong_type(name: str, expected: str) -> BlockdError:
    return BlockdError(f"Invalid parameter type for '{name}', expected: {expected}")
