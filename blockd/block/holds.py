"""Holds: what an export, a job or a command has on a node."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from blockd.block.node import Node
from blockd.block.permissions import Claim


class Follower(Protocol):
    """A user that goes along when another node takes the place of its own."""

    def quiesced(self) -> AbstractAsyncContextManager[None]:
        """The body runs with none of its writes in flight, and none beginning."""
        ...

    def follow(self, node: Node) -> None:
        """Use ``node`` from now on."""
        ...


class Hold:
    """One user's hold on a node. ``follower``: the user, if it goes along; a job stays."""

    def __init__(
        self,
        node: Node,
        claim: Claim,
        follower: Follower | None,
        on_release: Callable[[Hold], None],
    ) -> None:
        self.node = node
        self.follower = follower
        self.claim = claim
        self._on_release = on_release
        self._held = True
        node.users.add(claim)

    def move(self, node: Node) -> None:
        """Hold ``node`` instead, and tell the user."""
        assert self.follower is not None
        self.node.users.remove(self.claim)
        node.users.add(self.claim)
        self.node = node
        self.follower.follow(node)

    def release(self) -> None:
        """Give the node back; nothing happens the second time."""
        if self._held:
            self._held = False
            self.node.users.remove(self.claim)
            self._on_release(self)
