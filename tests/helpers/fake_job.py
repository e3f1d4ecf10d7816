"""A job that copies nothing, and the story of what clients see of it.

A story has a line for each command: what was published and which hooks ran until its answer and
then on to the next command. Hooks stand in brackets. So it reads as the same does in a log of
QEMU's monitor.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from blockd.errors import BlockdError
from blockd.events import Bus, Event
from blockd.job import ErrorAction, Group, Job, Jobs, OnError

CHUNK_BYTES = 64 * 1024


class Story:
    """Listens to the bus and keeps what happens as text, a line for each command."""

    def __init__(self, bus: Bus) -> None:
        self.lines: list[str] = []
        self.told: list[str] = []
        bus.subscribe(self._hear)

    def command(self, name: str) -> None:
        self.lines.append(f"{name}:")

    def tell(self, what: str) -> None:
        self.told.append(what)
        line = self.lines[-1]
        self.lines[-1] = f"{line} {what}" if line.endswith(":") else f"{line}, {what}"

    def _hear(self, event: Event) -> None:
        data = event.data
        name = data.get("id") or data["device"]
        self.tell(("" if name == "j" else f"{name} ") + _words(event))


def _words(event: Event) -> str:
    data = event.data
    match event.name:
        case "JOB_STATUS_CHANGE":
            return str(data["status"])
        case "BLOCK_JOB_ERROR":
            return f"ERROR {data['operation']} {data['action']}"
        case "BLOCK_JOB_PENDING":
            return "PENDING"
    done = f"{data['offset'] // CHUNK_BYTES}/{data['len'] // CHUNK_BYTES}"
    end = event.name.removeprefix("BLOCK_JOB_")
    return f"{end} {done} {data['error']}" if "error" in data else f"{end} {done}"


@dataclass
class Plan:
    """What a fake job does. What is in ``errors`` goes wrong once."""

    chunks: int = 4
    workers: int = 1
    chunk_seconds: float = 0
    #: Chunks are copied by something that no cancellation reaches.
    stubborn: bool = False
    policy: OnError = OnError.REPORT
    #: By a hook's name or a chunk's number.
    errors: dict[str | int, Exception] = field(default_factory=dict)
    #: How long a hook takes, in seconds.
    hook_seconds: dict[str, float] = field(default_factory=dict)


class FakeJob(Job):
    """Copies chunks of 64 KiB as the plan says."""

    def __init__(
        self,
        story: Story,
        plan: Plan | None = None,
        job_id: str = "j",
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(
            job_id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss
        )
        self.plan = plan or Plan()
        self.story = story
        self.copied_at: list[float] = []
        self._todo = list(range(self.plan.chunks))
        self._errors = dict(self.plan.errors)
        self.set_total(self.plan.chunks * CHUNK_BYTES)

    def start(self) -> None:
        self._told("start")

    def revoke(self) -> None:
        self._told("revoke")

    async def run(self) -> None:
        await self._hook("run")
        async with trio.open_nursery() as nursery:
            for _ in range(self.plan.workers):
                nursery.start_soon(self._work_on)

    async def prepare(self) -> None:
        await self._hook("prepare")

    def commit(self) -> None:
        self._told("commit")

    async def abort(self) -> None:
        await self._hook("abort")

    async def close(self) -> None:
        await self._hook("close")

    async def _hook(self, name: str) -> None:
        await trio.sleep(self.plan.hook_seconds.get(name, 0))
        self._told(name)

    def _told(self, name: str) -> None:
        if name != "run":
            self.story.tell(f"[{name}]" if self.id == "j" else f"{self.id} [{name}]")
        if name in self._errors:
            raise self._errors.pop(name)

    @asynccontextmanager
    async def instant(self) -> AsyncIterator[None]:
        """When the job may commit, after as many seconds as the plan has for that."""
        await trio.sleep(self.plan.hook_seconds.get("commit", 0))
        yield

    async def _work_on(self) -> None:
        while self._todo:
            async with self.turn():
                if self._todo:
                    await self._copy(self._todo.pop(0))

    async def _copy(self, chunk: int) -> None:
        self.charge(CHUNK_BYTES)
        self.copied_at.append(trio.current_time())
        try:
            with trio.CancelScope(shield=self.plan.stubborn):
                await trio.sleep(self.plan.chunk_seconds)
            if chunk in self._errors:
                raise self._errors.pop(chunk)
        except OSError as error:
            action = self.handle_error("write", error.errno or 0, self.plan.policy)
            if action is ErrorAction.REPORT:
                raise
            if action is ErrorAction.STOP:
                self._todo.insert(0, chunk)
                return
        self.advance(CHUNK_BYTES)


class Scene:
    """A registry with its bus and story. Commands are what a client would send."""

    def __init__(self, nursery: trio.Nursery) -> None:
        bus = Bus()
        self.nursery = nursery
        self.story = Story(bus)
        self.jobs = Jobs(nursery, bus)

    async def start(self, *jobs: FakeJob) -> None:
        """A command that starts jobs, which end together where there are several."""
        await self.command("start", lambda: self.begin(*jobs))

    async def begin(self, *jobs: FakeJob) -> None:
        """The same, with no words in the story. Raises what ``Jobs.admit`` raises."""
        started: list[FakeJob] = []
        try:
            for job in jobs:
                self.jobs.admit(job)
                started.append(job)
        except BaseException:
            for job in reversed(started):
                job.revoke()
            for job in reversed(jobs[: len(started) + 1]):
                await job.give_up()
            raise
        self.jobs.begin([Group(jobs, jobs[0].instant)])

    async def do(self, command: str, job_id: str = "j") -> None:
        """A command by its name: a method of the job; ``set-speed`` has its argument behind it."""
        name, *arguments = command.split()
        method = getattr(self.jobs.get(job_id), name.replace("-", "_"))
        await self.command(command, lambda: method(*map(int, arguments)))

    async def command(self, name: str, call: Callable[[], Awaitable[None] | None]) -> None:
        self.story.command(name)
        try:
            result = call()
            if inspect.isawaitable(result):
                await result
            self.story.tell("ok")
        except BlockdError as error:
            self.story.tell(f"REFUSED {error.message}")

    async def play(self, job: FakeJob, commands: Sequence[tuple[float, str]] = ()) -> str:
        """Start a job, give each command at its time, and tell the story of the next minutes."""
        begin = trio.current_time()
        await self.start(job)
        for seconds, command in commands:
            await trio.sleep_until(begin + seconds)
            await self.do(command)
        await trio.sleep(200)
        return " ".join(self.story.lines)


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """A registry in a nursery of its own, which is cancelled at the end."""
    async with trio.open_nursery() as nursery:
        yield Scene(nursery)
        nursery.cancel_scope.cancel()
