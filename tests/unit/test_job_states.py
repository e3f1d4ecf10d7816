"""The two tables of jobs against the specification's, and what an I/O error does."""

from __future__ import annotations

import errno

import pytest

from blockd.job import MAY, NEXT, ErrorAction, OnError, Status, Verb, action_on_error

STATES = """
    undefined  created
    created    running aborting null
    running    paused ready waiting aborting
    paused     running
    ready      standby waiting aborting
    standby    ready
    waiting    pending aborting
    pending    aborting concluded
    aborting   concluded
    concluded  null
    null
"""

VERBS = """
    cancel     created running paused ready standby waiting pending
    pause      created running paused ready standby
    resume     created running paused ready standby
    set-speed  created running paused ready standby
    change     created running paused ready standby
    complete   ready standby
    finalize   pending
    dismiss    concluded
"""

EIO, ENOSPC = errno.EIO, errno.ENOSPC


def rows(table: str) -> dict[str, set[str]]:
    words = [line.split() for line in table.strip().splitlines()]
    return {first: set(rest) for first, *rest in words}


def test_a_state_is_followed_by_those_of_the_specification() -> None:
    assert {str(status): {str(to) for to in after} for status, after in NEXT.items()} == rows(
        STATES
    )


def test_a_verb_is_allowed_in_the_states_of_the_specification() -> None:
    assert {str(verb): {str(status) for status in may} for verb, may in MAY.items()} == rows(VERBS)


def test_every_state_and_every_verb_has_its_row() -> None:
    assert set(NEXT) == set(Status)
    assert set(MAY) == set(Verb)


def test_every_life_ends() -> None:
    """From each state, ``null`` can be reached."""
    ending = {Status.NULL}
    while more := {status for status in Status if NEXT[status] & ending} - ending:
        ending |= more
    assert ending == set(Status)


@pytest.mark.parametrize(
    ("policy", "number", "action"),
    [
        (OnError.REPORT, EIO, ErrorAction.REPORT),
        (OnError.REPORT, ENOSPC, ErrorAction.REPORT),
        (OnError.IGNORE, EIO, ErrorAction.IGNORE),
        (OnError.IGNORE, ENOSPC, ErrorAction.IGNORE),
        (OnError.STOP, EIO, ErrorAction.STOP),
        (OnError.STOP, ENOSPC, ErrorAction.STOP),
        (OnError.ENOSPC, EIO, ErrorAction.REPORT),
        (OnError.ENOSPC, ENOSPC, ErrorAction.STOP),
        (OnError.AUTO, EIO, ErrorAction.REPORT),
        (OnError.AUTO, ENOSPC, ErrorAction.STOP),
    ],
)
def test_an_error_does_what_the_policy_says(
    policy: OnError, number: int, action: ErrorAction
) -> None:
    assert action_on_error(policy, number) is action
