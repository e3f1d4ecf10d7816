"""The file that a backup goes to, which others may delete, replace or cut meanwhile."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from blockd.block import SECTOR_BYTES, Node, Role
from blockd.job import JobError


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A regular file: where it was at the backup's start, and the node that has it open."""

    path: str
    node: Node

    @classmethod
    def of(cls, target: Node, path: str) -> Self:
        """The file at ``path``, which ``target`` stands on, maybe by way of other nodes."""
        node = target
        while (below := node.driver.children.get(Role.FILE)) is not None:
            node = below
        return cls(path, node)

    def check(self) -> None:
        """Raise ``JobError`` unless ``path`` still leads to it and it has its size. Blocks.

        What was written to a file that nobody can find is no backup.
        """
        identity, size_bytes = self.node.driver.identity, self.node.size_bytes
        if identity is None:
            return
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise JobError(f"The target '{self.path}' is gone: {error.strerror}") from error
        if (status.st_dev, status.st_ino) != identity:
            raise JobError(f"The target '{self.path}' was replaced by another file meanwhile")
        if -(-status.st_size // SECTOR_BYTES) * SECTOR_BYTES != size_bytes:
            raise JobError(
                f"The target '{self.path}' was resized meanwhile: "
                f"it has {status.st_size} bytes instead of {size_bytes}"
            )
