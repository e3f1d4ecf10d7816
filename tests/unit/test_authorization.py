"""Who is let in by lists of names, and how a certificate's name is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from blockd import limits
from blockd.errors import BlockdError
from blockd.objects import (
    AuthzList,
    AuthzListFile,
    AuthzSimple,
    Format,
    Objects,
    Policy,
    Rule,
    Secret,
    authorize,
)
from blockd.objects.authorization import distinguished_name

FRED = ((("organizationName", "Test"),), (("commonName", "fred"),))


@pytest.mark.parametrize(
    ("match", "form", "matching", "others"),
    [
        ("CN=a.b", Format.EXACT, ["CN=a.b"], ["CN=axb", "xCN=a.b", "CN=a.bx", "cn=a.b", ""]),
        ("CN=*", Format.EXACT, ["CN=*"], ["CN=a"]),
        (
            "CN=*,O=T?",
            Format.GLOB,
            ["CN=a,O=Té", "CN=,O=TT"],
            ["CN=a,O=T", "CN=a,O=TTT"],
        ),
        ("*", Format.GLOB, ["", "a\nb"], []),
        ("[ab]", Format.GLOB, ["[ab]"], ["a"]),
    ],
)
def test_a_rule_matches_the_whole_name(
    match: str, form: Format, matching: list[str], others: list[str]
) -> None:
    rule = Rule(match, Policy.ALLOW, form)
    assert [name for name in matching + others if rule.matches(name)] == matching


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        Rule("bob", Policy.DENY),
        Rule("b*", Policy.ALLOW, Format.GLOB),
        Rule("*", Policy.DENY, Format.GLOB),
    ]
    bounded = AuthzList(rules, Policy.ALLOW)
    assert [bounded.allows(name) for name in ("bob", "ben", "x")] == [False, True, False]
    assert AuthzList(rules[:2], Policy.ALLOW).allows("x")
    assert not AuthzList(rules[:2], Policy.DENY).allows("x")


def test_one_alone() -> None:
    assert AuthzSimple("a").allows("a")
    assert not AuthzSimple("a").allows("ab")
    assert not AuthzSimple("a").allows("")


# -- in a file -----------------------------------------------------------------------------------


def test_a_file_is_read_anew_or_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list"
    path.write_text('{"rules": [{"match": "a*", "policy": "allow", "format": "glob"}]}')
    fresh = AuthzListFile.load(str(path), refresh=True)
    once = AuthzListFile.load(str(path), refresh=False)
    for each in (fresh, once):
        assert each.allows("ab")
        assert not each.allows("b")
    path.write_text('{"policy": "allow"}')
    assert fresh.allows("b")
    assert not once.allows("b")
    path.write_text("{")
    assert not fresh.allows("b")
    assert once.allows("ab")
    assert f"'{path}' is no list of rules" in caplog.text
    assert "nobody is let in" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"[]",
        b"3",
        b"{} {}",
        b'{"wat": 1}',
        b'{"policy": "wat"}',
        b'{"rules": 3}',
        b'{"rules": [{"match": "a"}]}',
        b'{"rules": [{"match": 3, "policy": "deny"}]}',
        b'{"rules": [{"match": "a", "policy": "deny", "format": "regex"}]}',
        b'{"rules": [{"match": "a", "policy": "deny", "wat": 1}]}',
        b'{"rules": [{"match": "\xff", "policy": "deny"}]}',
    ],
)
def test_what_is_no_list(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list"
    path.write_bytes(content)
    with pytest.raises(BlockdError, match=f"^'{path}' is no list of rules: "):
        AuthzListFile.load(str(path), refresh=False)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * limits.AUTHZ_FILE_BYTES + b"{}")
    for name, reason in (
        ("none", f"Failed to open file “{tmp_path / 'none'}”: No such file or directory"),
        ("pipe", "it is not a regular file"),
        ("large", "over 1048576 bytes"),
    ):
        with pytest.raises(BlockdError) as refused:
            AuthzListFile.load(str(tmp_path / name), refresh=True)
        assert refused.value.message == f"Unable to read {tmp_path / name}: {reason}"


# -- certificates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        (FRED, "O=Test,CN=fred"),
        (((("commonName", "a"), ("userId", "b")),), "CN=a+UID=b"),
        (((("commonName", 'a,b+"\\<>;=#'),),), 'CN=a\\,b\\+\\"\\\\\\<\\>\\;=#'),
        (((("commonName", " a b "),),), "CN=\\ a b\\ "),
        (((("commonName", "#a"),),), "CN=\\#a"),
        (((("commonName", "é"),),), "CN=é"),
        (((("commonName", ""),),), "CN="),
        (((("commonName", "a\0b"),),), None),
        (((("1.2.3.4", "a"),),), None),
        ((), None),
    ],
)
def test_the_name_in_a_certificate(subject: Any, name: str | None) -> None:
    assert distinguished_name(subject) == name


async def test_who_is_asked_is_looked_up_each_time() -> None:
    objects = Objects()
    missing = "TLS x509 authz check for O=Test,CN=fred: no authz object 'who'"
    assert await refusal(objects, FRED) == missing
    objects.add("who", Secret(b"x"))
    assert await refusal(objects, FRED) == missing
    objects.remove("who")
    objects.add("who", AuthzSimple("O=Test,CN=fred"))
    assert await refusal(objects, FRED) is None
    objects.remove("who")
    objects.add("who", AuthzSimple("O=Test,CN=george"))
    assert await refusal(objects, FRED) == "TLS x509 authz check for O=Test,CN=fred is denied"
    lines = await refusal(objects, ((("commonName", "a\nb"),),))
    assert lines == "TLS x509 authz check for CN=a?b is denied"


@pytest.mark.parametrize("subject", [(), ((("1.2.3", "x"),),)])
async def test_who_has_no_name_is_not_let_in(subject: Any) -> None:
    objects = Objects()
    objects.add("who", AuthzList([Rule("*", Policy.ALLOW, Format.GLOB)], Policy.ALLOW))
    refused = await refusal(objects, subject)
    assert refused == f"TLS x509 authz check for {subject!r} is denied"


async def refusal(objects: Objects, subject: Any) -> str | None:
    try:
        await authorize(objects, "who", subject)
    except BlockdError as refused:
        return refused.message
    return None
