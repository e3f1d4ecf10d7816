"""How a job fails, and the one boundary around a job's own code."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator

import trio

from blockd import limits
from blockd.errors import BlockdError

_log = logging.getLogger(__name__)

#: The error of a job that was cancelled.
CANCELLED = os.strerror(errno.ECANCELED)


class JobError(Exception):
    """A job failed, and the message says why. An ``OSError`` fails a job just as well."""


async def guarded(
    job_id: str, hook: Callable[[], Awaitable[None]], scope: trio.CancelScope
) -> str | None:
    """Call a hook of a job inside the scope; returns the error for which it failed, or None.

    Whatever a job's code raises ends here and fails that job alone. Only a cancellation from
    outside the scope goes on.
    """
    error: str | None = None
    try:
        with scope:
            await hook()
    except* Exception as group:  # noqa: BLE001 - what a bug raises must not end the daemon
        error = _explain(job_id, group)
    return error


async def clean_up(job_id: str, hook: Callable[[], Awaitable[None]]) -> str | None:
    """The same for a hook that no cancellation from outside may keep from its work."""
    seconds = limits.JOB_CLEANUP_SECONDS
    scope = trio.move_on_after(seconds, shield=True)
    error = await guarded(job_id, hook, scope)
    if error is None and scope.cancelled_caught:
        error = f"not done within {seconds} seconds"
    if error is not None:
        _log.error("job '%s': %s: %s", job_id, hook.__name__, error)
    return error


def _explain(job_id: str, group: BaseExceptionGroup[Exception]) -> str:
    errors = list(_leaves(group))
    for each in errors:
        if not isinstance(each, JobError | BlockdError | OSError):
            _log.error("job '%s' failed unexpectedly", job_id, exc_info=each)
            return f"Internal error: {each!r}"
    return _text(errors[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or repr(error)
