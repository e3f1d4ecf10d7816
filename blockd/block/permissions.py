"""Who uses a node and what they let others do with it, as QEMU's permissions say it.

Every user of a node has a ``Claim``: exports and jobs by their own wish, a node above by what its
own users do (``child_access``). No two claims on a node conflict, at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import NamedTuple

from blockd.errors import BlockdError


class Role(Enum):
    """How a user holds a node."""

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
    #: A filter above that copies here what is overwritten.
    OLD_DATA = "old-data"

    @property
    def child_name(self) -> str:
        """QEMU's name of such a child."""
        return Role.TARGET.value if self is Role.OLD_DATA else self.value


class Perm(Flag):
    """What is done with a node, besides reading it, which everybody may."""

    NONE = 0
    WRITE = auto()
    RESIZE = auto()

    def __str__(self) -> str:
        return ", ".join(str(each.name).lower() for each in self)


_ALL = Perm.WRITE | Perm.RESIZE


class Access(NamedTuple):
    """What a user does with a node, and what others may do with it at the same time."""

    needs: Perm = Perm.NONE
    shares: Perm = _ALL


_READS = Access()

#: What a driver does with a child, while its own users have this access to it.


def of_part(access: Access) -> Access:
    """A part of the child is passed on, so the child must not change its size."""
    return access._replace(shares=access.shares & ~Perm.RESIZE)


def of_image_file(access: Access, *, writable: bool) -> Access:
    """The child is an image: it is changed without a guest's write, and by nobody else."""
    return Access(access.needs | (_ALL if writable else Perm.NONE), Perm.NONE)


def of_data_file(access: Access) -> Access:
    """The child holds an image's data and nothing else; it grows where it is written to."""
    grows = Perm.RESIZE if Perm.WRITE in access.needs else Perm.NONE
    return of_part(access._replace(needs=access.needs | grows))


def of_backing_file(access: Access) -> Access:
    """The child is only read; what it reads as must not change where the users rely on that."""
    return Access(Perm.NONE, _ALL if Perm.WRITE in access.shares else Perm.NONE)


@dataclass(slots=True, eq=False)
class Claim:
    """One user's hold on one node.

    ``alone``: whatever is written to what lies below must pass this node.
    """

    user: str
    role: Role
    access: Access = _READS
    alone: bool = False

    @property
    def fills(self) -> bool:
        """Whether it is a job's, which writes to the node."""
        return self.role is Role.TARGET and Perm.WRITE in self.access.needs


#: Why a node may not be changed, deleted or covered, by the role of one of its users.
_BLOCKERS: Mapping[Role, str] = {
    Role.SOURCE: "block device is in use by block job: backup",
    Role.TARGET: "block device is in use by block job: backup",
    Role.BACKING: "node is used as backing hd of {}",
}


class Users:
    """The claims on one node."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._claims: list[Claim] = []

    def add(self, claim: Claim) -> None:
        self._claims.append(claim)

    def remove(self, claim: Claim) -> None:
        self._claims.remove(claim)

    def __bool__(self) -> bool:
        return bool(self._claims)

    def __iter__(self) -> Iterator[Claim]:
        """The claims, newest first."""
        return reversed(self._claims)

    def of(self, role: Role) -> list[Claim]:
        """The claims held in ``role``."""
        return [claim for claim in self._claims if claim.role is role]

    def check_not_busy(self, *roles: Role) -> None:
        """Raise ``BlockdError`` where somebody holds the node in one of these roles."""
        for claim in self:
            if claim.role in roles:
                why = _BLOCKERS[claim.role].format(claim.user.removeprefix("node "))
                raise BlockdError(f"Node '{self._node_name}' is busy: {why}")

    def check(self, accesses: Mapping[Claim, Access]) -> Access:
        """What all users together do and share, if these are their accesses.

        Raises ``BlockdError`` where two of them conflict: of several conflicts the one that QEMU
        tells of.
        """
        for keeper in self:
            for taker in self:
                shared = accesses[keeper].shares & _shared(keeper, taker)
                taken = accesses[taker].needs & ~shared
                if taken and taker is not keeper:
                    raise self._conflict(taken, taker, keeper)
        total = Access()
        for claim in self:
            needs, shares = accesses[claim]
            total = Access(total.needs | needs, total.shares & shares)
        return total

    def _conflict(self, taken: Perm, taker: Claim, keeper: Claim) -> BlockdError:
        name = self._node_name
        one, other = (
            f"{claim.user} (uses node '{name}' as '{claim.role.child_name}' child)"
            for claim in (taker, keeper)
        )
        return BlockdError(
            f"Permission conflict on node '{name}': permissions '{taken}' are both required "
            f"by {one} and unshared by {other}."
        )


def _shared(keeper: Claim, taker: Claim) -> Perm:
    """What one may do because of what both are: no job overwrites what another one backs up."""
    fills = taker.role is Role.TARGET and keeper.role is Role.SOURCE
    return Perm.RESIZE if fills else _ALL
