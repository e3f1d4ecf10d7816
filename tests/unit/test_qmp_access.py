"""Who has which role, and which commands are for those who may only look."""

from __future__ import annotations

import os

import pytest

from blockd.__main__ import _access_list, _parser
from blockd.qmp.access import AccessList, Credentials, Holders, Role
from blockd.qmp.commands import COMMANDS

#: Commands that change nothing, and are not called ``query-…``.
OTHER_QUERIES = {"x-debug-block-dirty-bitmap-sha256"}

MASTERS = Holders(frozenset([10, 11]), frozenset([100]))
LOOKERS = Holders(frozenset([20, 11]), frozenset([200, 100]))


def client(uid: int, *groups: int) -> Credentials:
    return Credentials(1, uid, frozenset(groups))


@pytest.mark.parametrize(
    ("who", "role"),
    [
        (client(10, 1), Role.FULL),
        (client(1, 100), Role.FULL),
        (client(1, 1, 2, 100), Role.FULL),
        (client(20, 1), Role.READ_ONLY),
        (client(1, 1, 200), Role.READ_ONLY),
        # The greater of two.
        (client(11, 1), Role.FULL),
        (client(20, 1, 100), Role.FULL),
        # A group is no user.
        (client(100, 10), None),
        (client(1, 1, 2), None),
        (client(0, 0), None),
    ],
)
def test_roles(who: Credentials, role: Role | None) -> None:
    assert AccessList(MASTERS, LOOKERS).role_of(who) == role


def test_root_and_the_daemon_s_user_may_always() -> None:
    access_list = AccessList.of(Holders(), LOOKERS)
    assert access_list.role_of(client(0, 1)) is Role.FULL
    assert access_list.role_of(client(os.geteuid(), 1)) is Role.FULL
    assert access_list.role_of(client(20, 1)) is Role.READ_ONLY
    # Of their groups only who is named.
    assert access_list.role_of(client(1, 0)) is None


def given(*options: str) -> AccessList | None:
    return _access_list(_parser().parse_args(["--qmp", "unix:/x", *options]))


def test_the_command_line() -> None:
    assert given() is None
    named = given("--qmp-allow-uid", "10", "--qmp-allow-uid=11", "--qmp-allow-gid", "100")
    assert named == AccessList.of(MASTERS, Holders())
    looking = given("--qmp-allow-read-uid", "root", "--qmp-allow-read-gid", "root")
    assert looking == AccessList.of(Holders(), Holders(frozenset([0]), frozenset([0])))


@pytest.mark.parametrize("wrong", ["", "-1", "no such name", "1.5"])
@pytest.mark.parametrize("kind", ["uid", "gid", "read-uid", "read-gid"])
def test_names_that_there_are_not(
    wrong: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        given(f"--qmp-allow-{kind}={wrong}")
    assert (
        f"there is no {'user' if 'uid' in kind else 'group'} '{wrong}'" in capsys.readouterr().err
    )


def test_what_only_tells_and_nothing_else_is_for_those_who_may_only_look() -> None:
    read_only = {
        command.name for command in COMMANDS if getattr(command.declaration, "read_only", False)
    }
    queries = {command.name for command in COMMANDS if command.name.startswith("query-")}
    assert read_only == queries | OTHER_QUERIES
