"""A directory whose content is believed: nobody else may have written it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from blockd.errors import BlockdError

_OTHERS_WRITE = 0o022


def make_own(path: str) -> None:
    """Make it durably, for this user alone; or see that nobody else may write to the one there.

    One that others may list is left as it is: what is in it they can't read. Raises
    ``BlockdError`` where others may write or it is none, and ``OSError``.
    """
    made = _missing(path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except FileExistsError:
        raise BlockdError(
            f"'{path}' is not a directory: name one, or what can be made as one"
        ) from None
    for each in made:
        _sync(os.path.dirname(each))
    status = os.stat(path)
    why = "and what is known of backups must be blockd's own"
    if status.st_uid not in {os.geteuid(), 0}:
        raise BlockdError(
            f"'{path}' belongs to user {status.st_uid}, {why}: start blockd as that user, or "
            f"chown {os.geteuid()} '{path}'"
        )
    if status.st_mode & _OTHERS_WRITE:
        raise BlockdError(
            f"'{path}' can be written to by others (its mode is {status.st_mode & 0o7777:04o}), "
            f"{why}: chmod go-w '{path}'"
        )


def _missing(path: str) -> Sequence[str]:
    """It and what is above it, as far as that is not there."""
    missing = []
    at = os.path.abspath(path)
    while not os.path.lexists(at):
        missing.append(at)
        at = os.path.dirname(at)
    return missing


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
