"""The files that are published, and what the declarations that the daemon goes by make of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blockd.qmp.commands import schema
from scripts.protocol import PROTOCOL, declarations, files

REGENERATE = "is not what the declarations say: python -m scripts.protocol writes it anew"


@pytest.mark.parametrize(("name", "content"), files().items(), ids=files())
def test_what_is_published_is_what_is_declared(name: str, content: str) -> None:
    published = (PROTOCOL / name).read_text(encoding="utf-8")
    # Compared without pytest's help: its diff of two long texts hides the way out.
    same = published == content
    assert same, f"protocol/{name} {REGENERATE}"


def test_the_published_schema_is_the_daemon_s() -> None:
    assert json.loads((PROTOCOL / "schema.json").read_text(encoding="utf-8")) == schema()


def test_the_reference_has_every_command_event_and_member() -> None:
    reference = (PROTOCOL / "reference.md").read_text(encoding="utf-8")
    headings = [line[4:] for line in reference.splitlines() if line.startswith("### ")]
    assert len(set(headings)) == len(headings)
    assert {entity["name"] for entity in schema() if "arg-type" in entity} <= set(headings)
    for member in members():
        assert f"- `{member}`: " in reference, member


def test_every_link_of_the_reference_leads_somewhere() -> None:
    reference = (PROTOCOL / "reference.md").read_text(encoding="utf-8")
    headings = {line[4:].lower() for line in reference.splitlines() if line.startswith("### ")}
    links = {part.partition(")")[0] for part in reference.split("](#")[1:]}
    assert links
    assert links <= headings


def test_every_declaration_says_what_it_means() -> None:
    # Looked up in the class itself, for a docstring is not inherited in meaning.
    assert [
        name for name, declared in declarations().items() if not vars(declared)["__doc__"]
    ] == []


def members() -> set[Any]:
    return {
        member["name"]
        for entity in schema()
        if entity["meta-type"] == "object"
        for member in entity["members"]
    }
