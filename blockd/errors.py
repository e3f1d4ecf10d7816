"""What can be refused or fail, by kind. The QMP class and the NBD errno are chosen at the edges.

I/O trouble stays an ``OSError`` with its errno all the way from the driver to the edge.
"""

from __future__ import annotations


class BlockdError(Exception):
    """A request was refused, and nothing was changed by it.

    The message is the sentence the user reads: it names the thing and, where there is one, the
    way out. At the QMP edge this is a ``GenericError``; the subclasses below have classes of
    their own there.
    """

    @property
    def message(self) -> str:
        return str(self.args[0])


class DeviceNotActiveError(BlockdError):
    """A legacy ``block-job-*`` command names a job that does not exist."""


class CommandNotFoundError(BlockdError):
    """There is no such command, or it is not allowed in this phase of a session."""


class WouldBlock(Exception):  # noqa: N818 - a signal to take the other path, not an error
    """A ``*_nowait`` call can't finish at once; it has changed nothing. Use the async call.

    Raise a new one each time: one that is kept collects the frames of all who raise it.
    """
