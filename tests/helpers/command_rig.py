"""QMP's commands over nodes in memory, without a socket: what clients ask, and what they hear."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from blockd.block import Graph, Node
from blockd.events import Bus, Event
from blockd.job import Jobs
from blockd.nbd import NbdServer
from blockd.qmp.commands import COMMANDS
from blockd.qmp.dispatch import Dispatcher
from blockd.qmp.services import Services
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.patience import PATIENCE_SECONDS


def action(kind: str, **data: Any) -> dict[str, Any]:
    """An action of a transaction; ``job_id`` stands for the member ``job-id``."""
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


class CommandRig:
    """Nodes by name. ``events`` are all that were published."""

    def __init__(self, nursery: trio.Nursery, drivers: dict[str, MemoryDriver]) -> None:
        self.graph = Graph()
        self.drivers = drivers
        self.nodes: dict[str, Node] = {
            name: self.graph.add(name, driver, owned=True) for name, driver in drivers.items()
        }
        self.events: list[Event] = []
        bus = Bus()
        bus.subscribe(self.events.append)
        self.jobs = Jobs(nursery, bus)

        async def end_service() -> None:
            """Nothing here ends."""

        services = Services(
            self.graph, self.jobs, NbdServer(nursery, bus), bus, end_service, lambda: None
        )
        self._dispatcher = Dispatcher(COMMANDS, services)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """The command's answer; ``node_name`` stands for the argument ``node-name``."""
        sent = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._dispatcher.execute(command, sent)

    async def transact(self, *actions: dict[str, Any], grouped: bool = False) -> None:
        properties = {"completion-mode": "grouped" if grouped else "individual"}
        await self.execute("transaction", actions=[*actions], properties=properties)

    async def rehearse(self, *actions: dict[str, Any], grouped: bool = False) -> list[str | None]:
        """What a dry run says of each action: its error, or None."""
        properties = {"completion-mode": "grouped" if grouped else "individual"}
        answer = await self.execute(
            "transaction", actions=[*actions], properties=properties, dry_run=True
        )
        results = answer["actions"]
        assert [result["type"] for result in results] == [each["type"] for each in actions]
        return [result["error"]["desc"] if "error" in result else None for result in results]

    async def write(self, name: str, offset: int, length: int) -> None:
        """What a guest writes."""
        await self.nodes[name].write(offset, memoryview(b"w" * length))

    def statuses(self) -> list[str]:
        """What was told of jobs, as ``ID STATUS``."""
        told = (event.data for event in self.events if event.name == "JOB_STATUS_CHANGE")
        return [f"{data['id']} {data['status']}" for data in told]

    def state(self) -> dict[str, Any]:
        """All that a client can see, and what it can't: every bitmap's bits."""
        return {
            name: (
                node.bitmaps.infos(),
                [bitmap.copy_bits().digest() for bitmap in node.bitmaps.list()],
                len(node._hooks),
                bool(node.users),
            )
            for name, node in self.nodes.items()
        } | {"jobs": self.jobs.query(), "nodes": [node.name for node in self.graph]}


@asynccontextmanager
async def command_rig(**drivers: MemoryDriver) -> AsyncIterator[CommandRig]:
    """A test that hangs fails; the jobs that are left are cancelled."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            yield CommandRig(nursery, drivers)
            nursery.cancel_scope.cancel()
