"""Files that commands name, and that are read as a whole."""

from __future__ import annotations

import os
import stat

from blockd.errors import BlockdError


def read_file(path: str, most_bytes: int) -> bytes:
    """All of it. Raises ``BlockdError`` where it is no regular file, or has more than that."""
    what = "Failed to open"
    try:
        # Nobody may ever write to a pipe that is opened here.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        what = "Error reading"
        try:
            status = os.fstat(fd)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise BlockdError(f"Unable to read {path}: it is not a regular file")
            # A directory is refused before anything would own, and close, the descriptor.
            with open(fd, "rb", closefd=False) as file:
                content = file.read(most_bytes + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise BlockdError(
            f"Unable to read {path}: {what} file “{path}”: {error.strerror}"
        ) from error
    if len(content) > most_bytes:
        raise BlockdError(f"Unable to read {path}: over {most_bytes} bytes")
    return content
