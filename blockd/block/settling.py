"""What the users of the nodes at the top mean for those below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter

from blockd import limits
from blockd.block.holds import Hold
from blockd.block.node import Node
from blockd.block.permissions import Access, Claim, Perm, Role
from blockd.errors import BlockdError

#: What each node stands on, by role, with its claim there.
Below = Mapping[Node, Mapping[Role, tuple[Node, Claim]]]


def from_the_top(below: Below) -> Iterable[Node]:
    """All nodes, each after all that stand on it."""
    order: TopologicalSorter[Node] = TopologicalSorter()
    for parent, children in below.items():
        order.add(parent)
        for child, _ in children.values():
            order.add(child, parent)
    return order.static_order()


def in_order_of_waits(below: Below, holds: Iterable[Hold]) -> Iterable[Node]:
    """All nodes, each before those that a write to it may wait for.

    It waits for the nodes below that it goes on to, which a backing file is not; and where a job
    or a filter keeps what it overwrites, for the target of that. No target is the source of
    another job.
    """
    order: TopologicalSorter[Node] = TopologicalSorter()
    for parent, children in below.items():
        order.add(parent)
        for role, (child, _) in children.items():
            if role is not Role.BACKING:
                order.add(child, parent)
        if Role.OLD_DATA in children:
            order.add(children[Role.OLD_DATA][0], children[Role.FILE][0])
    sources = {hold.claim.user: hold.node for hold in holds if hold.claim.role is Role.SOURCE}
    for hold in holds:
        if hold.claim.fills and hold.claim.user in sources:
            order.add(hold.node, sources[hold.claim.user])
    return order.static_order()


def settle(below: Below) -> None:
    """Give the claim of each node on another what its own users make it need, and share.

    Raises ``BlockdError`` where two users of a node conflict, or too many nodes stand on each
    other; then no claim is changed.
    """
    accesses: dict[Claim, Access] = {}
    levels: dict[Node, int] = {}
    for node in from_the_top(below):
        level = levels.setdefault(node, 1)
        if level > limits.NODE_LEVELS:
            raise BlockdError(f"More than {limits.NODE_LEVELS} nodes would stand on each other")
        accesses = {claim: claim.access for claim in node.users} | accesses
        total = node.users.check(accesses)
        if Perm.WRITE in total.needs and node.read_only:
            raise BlockdError("Block node is read-only")
        if any(claim.alone for claim in node.users):
            total = total._replace(shares=Perm.NONE)
        for role, (child, claim) in below[node].items():
            accesses[claim] = node.driver.child_access(role, total)
            levels[child] = max(levels.get(child, 1), level + 1)
    for claim, access in accesses.items():
        claim.access = access
