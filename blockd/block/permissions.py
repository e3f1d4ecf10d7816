"""Who uses a node and what they let others do with it, as QEMU's permissions say it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from blockd.errors import BlockdError


class Role(Enum):
    """How a user holds a node; the value is how QEMU names such a child."""

    #: An export.
    ROOT = "root"
    #: A node above.
    FILE = "file"
    #: A job that reads the node, or one that fills it.
    SOURCE = "source"
    TARGET = "target"


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One user's hold on one node; give it back with ``Users.release``."""

    user: str
    role: Role
    writes: bool
    shares_writes: bool


class Users:
    """The claims on one node. No two of them conflict, at any time."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._claims: list[Claim] = []

    def claim(
        self, user: str, role: Role = Role.ROOT, *, writes: bool, shares_writes: bool = True
    ) -> Claim:
        """Hold the node as ``user``; raises ``BlockdError`` where another claim forbids it.

        ``writes``: this user writes to the node. ``shares_writes``: it stands others that do.
        """
        wanted = Claim(user, role, writes, shares_writes)
        for held in self._claims:
            # What one user does with the node is in its own hands.
            if held.user == user:
                continue
            if wanted.writes and not held.shares_writes:
                raise self._conflict(wanted, held)
            if held.writes and not wanted.shares_writes:
                raise self._conflict(held, wanted)
        self._claims.append(wanted)
        return wanted

    def release(self, claim: Claim) -> None:
        self._claims.remove(claim)

    def __bool__(self) -> bool:
        return bool(self._claims)

    def of(self, role: Role) -> list[Claim]:
        """The claims held in ``role``."""
        return [claim for claim in self._claims if claim.role is role]

    def check_no_job(self, *roles: Role) -> None:
        """Raise ``BlockdError`` where a job holds the node in one of ``roles``."""
        if any(self.of(role) for role in roles):
            raise BlockdError(
                f"Node '{self._node_name}' is busy: block device is in use by block job: backup"
            )

    def _conflict(self, writer: Claim, keeper: Claim) -> BlockdError:
        name = self._node_name
        return BlockdError(
            f"Permission conflict on node '{name}': permissions 'write' are both required by "
            f"{writer.user} (uses node '{name}' as '{writer.role.value}' child) and unshared by "
            f"{keeper.user} (uses node '{name}' as '{keeper.role.value}' child)."
        )
