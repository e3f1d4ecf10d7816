"""Who uses a node and what they let others do with it, as QEMU's permissions say it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from blockd.errors import BlockdError


class Role(Enum):
    """How a user holds a node; the value is how QEMU names such a child."""

    #: An export, or a command that changes the node's size.
    ROOT = "root"
    #: A node above that keeps its data here, or the data apart from what describes it.
    FILE = "file"
    DATA_FILE = "data-file"
    #: A node above that reads here what it does not hold itself, and never writes.
    BACKING = "backing"
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
    resizes: bool
    shares_resize: bool


class Users:
    """The claims on one node. No two of them conflict, at any time."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._claims: list[Claim] = []

    def claim(
        self,
        user: str,
        role: Role = Role.ROOT,
        *,
        writes: bool,
        shares_writes: bool = True,
        resizes: bool = False,
        shares_resize: bool = False,
    ) -> Claim:
        """Hold the node as ``user``; raises ``BlockdError`` where another claim forbids it.

        ``writes``: this user writes to the node. ``shares_writes``: it stands others that do.
        ``resizes``, ``shares_resize``: the same of the node's size.
        """
        wanted = Claim(user, role, writes, shares_writes, resizes, shares_resize)
        for held in self._claims:
            # What one user does with the node is in its own hands; those at a root have no names.
            if held.user == user and role is not Role.ROOT:
                continue
            for one, other in ((wanted, held), (held, wanted)):
                if one.writes and not (other.shares_writes and _may_fill(one, other)):
                    raise self._conflict("write", one, other)
                if one.resizes and not other.shares_resize:
                    raise self._conflict("resize", one, other)
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

    def _conflict(self, permission: str, taker: Claim, keeper: Claim) -> BlockdError:
        name = self._node_name
        return BlockdError(
            f"Permission conflict on node '{name}': permissions '{permission}' are both required "
            f"by {taker.user} (uses node '{name}' as '{taker.role.value}' child) and unshared by "
            f"{keeper.user} (uses node '{name}' as '{keeper.role.value}' child)."
        )


def _may_fill(writer: Claim, other: Claim) -> bool:
    """Guests write to what a job backs up, but no other job overwrites it."""
    return writer.role is not Role.TARGET or other.role is not Role.SOURCE
