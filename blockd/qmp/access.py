"""Who may use the QMP socket, and how far: by the credentials that the kernel tells of a client."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Self

#: SO_PEERGROUPS of unix(7), which Python has no name for.
_SO_PEERGROUPS = 59
#: What Python's getsockopt takes at the most.
_GROUPS_BYTES = 1024


class Role(Enum):
    """What a client may do."""

    #: Everything.
    FULL = "full"
    #: Commands that change nothing, and hear events.
    READ_ONLY = "read-only"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whose process a client was when it connected; ``groups`` has its supplementary ones too."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, client: socket.socket) -> Self:
        """Of the process at the other end of a Unix socket."""
        size = struct.calcsize("iII")
        pid, uid, gid = struct.unpack(
            "iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
        return cls(pid, uid, frozenset([gid, *_supplementary_groups(client)]))


def _supplementary_groups(client: socket.socket) -> tuple[int, ...]:
    try:
        data = client.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno == errno.ERANGE:
            # More than there is room for: of somebody in so many groups, only the first counts.
            return ()
        raise
    return struct.unpack(f"{len(data) // 4}I", data)


@dataclass(frozen=True, slots=True)
class Holders:
    """Users by id, and by the groups that they are in."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def __contains__(self, client: Credentials) -> bool:
        return client.uid in self.uids or bool(client.groups & self.gids)


@dataclass(frozen=True, slots=True)
class AccessList:
    """Who has which role. Whoever is in neither has no access; in both, full access."""

    full: Holders
    read_only: Holders

    @classmethod
    def of(cls, full: Holders, read_only: Holders) -> Self:
        """With root and the daemon's own user, who rule the daemon anyway, added to ``full``."""
        always = {0, os.geteuid()}
        return cls(Holders(full.uids | always, full.gids), read_only)

    def role_of(self, client: Credentials) -> Role | None:
        """None: it is to be refused."""
        if client in self.full:
            return Role.FULL
        return Role.READ_ONLY if client in self.read_only else None


@dataclass(frozen=True, slots=True)
class Client:
    """One connection; ``number`` tells it from the others of the daemon's life."""

    number: int
    credentials: Credentials
    role: Role

    def __str__(self) -> str:
        return f"QMP client {self.number} (uid {self.credentials.uid}, pid {self.credentials.pid})"
