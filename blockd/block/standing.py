"""Who stands on whom, and who holds which node."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from blockd.block.holds import Hold
from blockd.block.node import Node
from blockd.block.permissions import Claim, Role
from blockd.block.settling import settle


class Standing:
    """The nodes, each with what it stands on; and the holds of all that are no nodes."""

    def __init__(self) -> None:
        #: What each node stands on, by role, with its claim there.
        self.children: dict[Node, dict[Role, tuple[Node, Claim]]] = {}
        self.holds: list[Hold] = []

    def settle(self) -> None:
        """Let all claims follow from those of the users. Raises ``BlockdError`` on a conflict."""
        settle(self.children)

    def link(self, parent: Node, role: Role, child: Node) -> None:
        claim = Claim(f"node '{parent.name}'", role)
        child.users.add(claim)
        self.children[parent][role] = (child, claim)

    def unlink(self, parent: Node, role: Role) -> None:
        child, claim = self.children[parent].pop(role)
        child.users.remove(claim)

    def unlink_all(self, parent: Node) -> list[Node]:
        """Take a node out; returns what it stood on."""
        children = [child for child, _ in self.children[parent].values()]
        for role in list(self.children[parent]):
            self.unlink(parent, role)
        del self.children[parent]
        return children

    def below(self, node: Node) -> Iterator[Node]:
        """The nodes that ``node`` stands on, down to the storage, each once and nearest first."""
        seen = {node: None}

        def look(above: Node) -> None:
            for child, _ in self.children[above].values():
                if child not in seen:
                    seen[child] = None
                    look(child)

        look(node)
        return itertools.islice(seen, 1, None)

    def written(self, node: Node) -> Iterator[Node]:
        """``node``, and those below it that a write to it may reach."""
        yield node
        for role, (child, _) in self.children[node].items():
            if role is not Role.BACKING:
                yield from self.written(child)

    def above(self, node: Node) -> Iterator[Node]:
        """The nodes that stand on ``node``, nearest first."""
        for parent, _ in self.parents(node):
            yield parent
            yield from self.above(parent)

    def parents(self, node: Node) -> list[tuple[Node, Role]]:
        return [
            (parent, role)
            for parent, children in self.children.items()
            for role, (child, _) in children.items()
            if child is node
        ]
