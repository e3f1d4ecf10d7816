"""Write what is published of QMP: ``protocol/schema.json`` and ``protocol/reference.md``.

``python -m scripts.protocol`` after a change of the declarations in ``blockd/qmp/types``.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from blockd.qmp import types
from blockd.qmp.commands import schema
from blockd.qmp.dispatch import ERROR_CLASSES
from blockd.qmp.introspection import Entity
from blockd.qmp.types import base

PROTOCOL = Path(__file__).parents[1] / "protocol"

_INTRODUCTION = """\
# Reference

Generated from the declarations that blockd checks commands with; `schema.json` is the same for
programs. Members are in the order in which they are checked. A member that is optional has its
default, if it has one, in parentheses; it may be left out, but is not `null` unless its type says
so.
"""

_ERRORS = """\
An error has a class, which is one of these, and a description for people. What fails for another
reason than these, such as a disk's error, is a `GenericError` too.
"""


def files() -> dict[str, str]:
    """The content of each published file, by name."""
    return {"schema.json": schema_file(), "reference.md": Reference().text()}


def schema_file() -> str:
    """JSON with one command, event or type a line."""
    return "[\n" + ",\n".join(json.dumps(entity) for entity in schema()) + "\n]\n"


def declarations() -> dict[str, type[msgspec.Struct]]:
    """Every Struct, by its name, which is its type's name in the schema."""
    modules = [
        import_module(f"{types.__name__}.{found.name}")
        for found in pkgutil.iter_modules(types.__path__)
    ]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base.Object)
    }


class Reference:
    """The schema in words: what it says of types, and what the declarations' docstrings mean."""

    def __init__(self) -> None:
        self._entities = {entity["name"]: entity for entity in schema()}
        self._declarations = declarations()

    def text(self) -> str:
        return "\n".join(self._lines()).rstrip("\n") + "\n"

    def _lines(self) -> Iterator[str]:
        yield _INTRODUCTION
        for module, calls in self._by_module().items():
            heading, _, rest = _markdown(module).partition(".")
            yield f"## {heading}\n"
            if rest:
                yield rest.strip() + "\n"
            for call in calls:
                yield from self._call(call)
        yield "## Errors\n"
        yield _ERRORS
        for error, name in ERROR_CLASSES.items():
            yield f"- `{name}`: {_markdown(error).partition(chr(10) * 2)[0]}"
        yield "\n## Types\n"
        for name in sorted(self._named_types()):
            yield f"### {name}\n"
            yield from self._type(name)

    def _by_module(self) -> dict[ModuleType, list[Entity]]:
        """Commands and events, by the module whose docstring is their heading; events last."""
        calls = [each for each in self._entities.values() if "arg-type" in each]
        modules: dict[ModuleType, list[Entity]] = {}
        for call in calls:
            declaration = self._declarations[call["arg-type"]]
            modules.setdefault(import_module(declaration.__module__), []).append(call)
        return dict(sorted(modules.items(), key=lambda item: item[1][0]["meta-type"]))

    def _call(self, call: Entity) -> Iterator[str]:
        yield f"### {call['name']}\n"
        yield from self._type(call["arg-type"])
        if call["meta-type"] == "command":
            result = call["ret-type"]
            yield f"Answers {'`{}`' if result == 'Nothing' else self._spell(result)}.\n"

    def _type(self, name: str) -> Iterator[str]:
        """What a type means and consists of."""
        entity = self._entities[name]
        if entity["meta-type"] == "alternate":
            yield " or ".join(self._spell(each["type"]) for each in entity["members"]) + ".\n"
            return
        yield self._meaning(name) + "\n"
        yield from self._members(entity)
        for variant in entity.get("variants", ()):
            yield f"With `{entity['tag']}` `{variant['case']}`: {self._meaning(variant['type'])}\n"
            yield from self._members(self._entities[variant["type"]])

    def _meaning(self, name: str) -> str:
        """The docstring, and what those of its bases say of the members that it has from them."""
        own, *bases = [
            _markdown(each)
            for each in self._declarations[name].__mro__
            if each.__module__.startswith(types.__name__) and each.__module__ != base.__name__
        ]
        if self._is_variant(name):
            return own
        return "\n\n".join([own, *(rest for each in bases if (rest := _after_summary(each)))])

    def _is_variant(self, name: str) -> bool:
        """Whether a type is only what a tag adds to another one, which is told there."""
        return any(
            variant["type"] == name
            for entity in self._entities.values()
            for variant in entity.get("variants", ())
        )

    def _members(self, entity: Entity) -> Iterator[str]:
        defaults = _defaults(self._declarations[entity["name"]])
        for member in entity["members"]:
            line = f"- `{member['name']}`: {self._spell(member['type'])}"
            if "default" in member:
                line += ", optional"
                if (default := defaults[member["name"]]) not in (None, msgspec.UNSET):
                    line += f" (`{json.dumps(default)}`)"
            yield line
        if entity["members"]:
            yield ""

    def _spell(self, name: str) -> str:
        entity = self._entities[name]
        match entity["meta-type"]:
            case "builtin":
                return name
            case "enum":
                *others, last = (f"`{value}`" for value in entity["values"])
                return f"{', '.join(others)} or {last}" if others else last
            case "array":
                return f"list of {self._spell(entity['element-type'])}"
            case _:
                return f"[{name}](#{self._section(name).lower()})"

    def _section(self, name: str) -> str:
        """The heading under which a type is told: its own, or the command's that takes it."""
        calls = (each["name"] for each in self._entities.values() if each.get("arg-type") == name)
        return next(calls, name)

    def _named_types(self) -> set[str]:
        """The types that members and results are of, and that have a section of their own."""
        used = {
            each["type"]
            for entity in self._entities.values()
            if entity["meta-type"] in ("object", "alternate")
            for each in entity["members"]
        }
        used |= {each["ret-type"] for each in self._entities.values() if "ret-type" in each}
        used |= {self._entities[each].get("element-type", each) for each in used}
        return {
            name
            for name in used - {"Nothing"}
            if self._entities[name]["meta-type"] in ("object", "alternate")
            and self._section(name) == name
        }


def _defaults(declaration: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.default for field in msgspec.structs.fields(declaration)}


def _markdown(documented: object) -> str:
    return (inspect.getdoc(documented) or "").replace("``", "`")


def _after_summary(text: str) -> str:
    return text.partition("\n\n")[2]


def main() -> None:
    """Write the files."""
    for name, content in files().items():
        (PROTOCOL / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
