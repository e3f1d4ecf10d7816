"""The lock of a state directory: one daemon has it at a time."""

from __future__ import annotations

import errno
import fcntl
import os

from blockd.errors import BlockdError


class DirectoryLock:
    """Held until ``release``, or until the process ends in whatever way."""

    def __init__(self, path: str) -> None:
        """``path``: the directory. Raises ``BlockdError`` where it is taken, and ``OSError``."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(os.path.join(path, "lock"), flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise BlockdError(
                f"The state directory '{path}' is in use by another blockd (process {holder})"
            ) from None
        except OSError as error:
            # Who holds it is only for the message: a full disk must not keep the daemon out.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.close(self._fd)
                raise

    def release(self) -> None:
        os.close(self._fd)
