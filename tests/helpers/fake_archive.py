"""An archive in memory that logs what it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from blockd.block import Coming, Node


class FakeArchive:
    """``ready``: what ``keep`` waits for. ``writable``: whether anything can be expected."""

    keeps_any = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.ready = trio.Event()
        self.ready.set()
        self.writable = True
        self.coming: list[Coming] = []

    def check_persistent(self, node: Node) -> None:
        """Everything can be kept."""

    async def look_at(self, file: Node) -> None:
        self.log.append(f"look at {file.name}")

    async def opening_ended(self) -> None:
        """Nothing to do."""

    async def attach(self, node: Node) -> None:
        self.log.append(f"attach {node.name}")

    async def expect(self, node: Node, coming: Coming) -> bool:
        self.coming.append(coming)
        self.log.append(f"expect {coming.name} on {node.name}")
        return self.writable

    async def keep(self, node: Node) -> bool:
        await self.ready.wait()
        self.log.append(f"keep {node.name}")
        return True

    async def settle(self, node: Node) -> None:
        self.log.append(f"settle {node.name}")

    @asynccontextmanager
    async def closing(self, node: Node) -> AsyncIterator[None]:
        self.log.append(f"close {node.name}")
        yield
        self.log.append(f"closed {node.name}")

    async def record_job(self, job_id: str, facts: Mapping[str, str]) -> None:
        self.log.append(f"record {job_id} {' '.join(facts.values())}")

    async def forget_job(self, job_id: str) -> None:
        self.log.append(f"forget {job_id}")
