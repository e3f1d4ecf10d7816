"""Actions: commands that take effect at one instant with others, all of them or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

from blockd import limits
from blockd.block import Node
from blockd.job import Group, Job
from blockd.qmp.services import Services


def _nothing() -> None:
    """Nothing is left to be done."""


@dataclass(frozen=True, slots=True)
class Change:
    """What has taken effect. ``commit`` or ``undo`` follows at the same instant; neither fails."""

    undo: Callable[[], None]
    commit: Callable[[], None] = _nothing


class Action(ABC):
    """One action. These are called in this order::

        stage           whatever waits, with guests writing on
        take_effect     at one instant for all actions, with all ``nodes`` quiesced
        settle          always, newest first

    All are undone, newest first, where one is refused: the first that is says why.
    """

    #: Whether it may be in a transaction whose jobs end together.
    groupable = True
    #: The job that it made, if it did; it begins when all have taken effect.
    job: Job | None = None

    async def stage(self) -> None:
        """Do what nobody sees. What is wrong is for ``take_effect`` to say."""
        await trio.lowlevel.checkpoint()

    def nodes(self) -> Iterable[Node]:
        """Those whose writes come before or after all of the transaction."""
        return ()

    @abstractmethod
    def take_effect(self) -> Change:
        """Do it, or raise ``BlockdError`` having changed nothing."""

    async def settle(self, *, committed: bool) -> None:
        """Let go of what is not needed any more."""
        await trio.lowlevel.checkpoint()


async def carry_out(
    services: Services, actions: Sequence[Action], *, grouped: bool = False
) -> None:
    """Do all actions at one instant, or raise what the first one raises, and do nothing.

    ``grouped``: their jobs end together. Otherwise each ends by itself.
    """
    async with at_one_instant(services, actions) as instant:
        changes: list[Change] = []
        with ExitStack() as undo:
            for action in actions:
                change = action.take_effect()
                undo.callback(change.undo)
                changes.append(change)
            undo.pop_all()
        instant.committed = True
        for change in changes:
            change.commit()
        _begin(services, actions, grouped=grouped)


class Instant:
    """What has become of the actions, in the end."""

    committed = False


@asynccontextmanager
async def at_one_instant(services: Services, actions: Sequence[Action]) -> AsyncIterator[Instant]:
    """Stage the actions, run the body with their nodes quiesced, and settle them.

    In the body is no await, so nothing is seen of what it does and undoes.
    """
    instant = Instant()
    async with AsyncExitStack() as settling:
        for action in actions:
            settling.push_async_callback(_settle, action, instant)
            await action.stage()
        nodes = {node for action in actions for node in action.nodes()}
        async with services.graph.places.quiesced(nodes):
            yield instant


async def _settle(action: Action, instant: Instant) -> None:
    with trio.move_on_after(limits.JOB_CLEANUP_SECONDS, shield=True):
        await action.settle(committed=instant.committed)


def _begin(services: Services, actions: Sequence[Action], *, grouped: bool) -> None:
    jobs = [(action.job, list(action.nodes())) for action in actions if action.job is not None]
    if grouped and jobs:
        nodes = [node for _, used in jobs for node in used]
        groups = [Group([job for job, _ in jobs], partial(services.graph.places.quiesced, nodes))]
    else:
        groups = [
            Group([job], partial(services.graph.places.quiesced, nodes)) for job, nodes in jobs
        ]
    services.jobs.begin(groups)
