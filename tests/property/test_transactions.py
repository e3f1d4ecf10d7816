"""Any transaction, against a model: all of it or nothing, wherever it fails."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.errors import BlockdError
from tests.helpers.backup_rig import CLUSTER, use_small_limits
from tests.helpers.command_rig import CommandRig, action, command_rig
from tests.helpers.memory_driver import MemoryDriver

SIZE = 16 * CLUSTER
SECTOR = 512
DISKS = ("n", "m")
TARGETS = ("t", "u")

Action = dict[str, Any]


@dataclass
class Bitmap:
    """``dirty`` are sectors, whole granules of them. ``taken``: what may not be changed now."""

    granularity: int
    recording: bool = True
    dirty: set[int] = field(default_factory=set)
    taken: bool = False

    def mark(self, sectors: set[int]) -> None:
        step = self.granularity // SECTOR
        self.dirty |= {at // step * step + n for at in sectors for n in range(step)}


@dataclass
class Job:
    device: str
    target: str
    bitmap: str | None
    mode: str | None


class RefusedError(Exception):
    """The model refuses an action."""


class Model:
    """What a client can tell of two disks; ``apply`` is what an action does at the instant."""

    def __init__(self) -> None:
        self.bitmaps: dict[str, dict[str, Bitmap]] = {disk: {} for disk in DISKS}
        self.removed: list[tuple[str, str]] = []
        self.jobs: dict[str, Job] = {}

    def apply(self, told: Action) -> None:
        kind, data = told["type"].removeprefix("block-dirty-bitmap-"), told["data"]
        match kind:
            case "abort":
                raise RefusedError
            case "add":
                self._add(data)
            case "remove":
                self._usable(data["node"], data["name"]).taken = True
                self.removed.append((data["node"], data["name"]))
            case "clear":
                self._usable(data["node"], data["name"]).dirty = set()
            case "enable" | "disable":
                self._usable(data["node"], data["name"]).recording = kind == "enable"
            case "merge":
                self._merge(data)
            case _:
                self._back_up(data)

    def _usable(self, disk: str, name: str) -> Bitmap:
        bitmap = self.bitmaps[disk].get(name)
        if bitmap is None or bitmap.taken:
            raise RefusedError
        return bitmap

    def _add(self, data: Action) -> None:
        if data["name"] in self.bitmaps[data["node"]]:
            raise RefusedError
        self.bitmaps[data["node"]][data["name"]] = Bitmap(
            data["granularity"], recording=not data["disabled"]
        )

    def _merge(self, data: Action) -> None:
        target = self._usable(data["node"], data["target"])
        sources = [self._usable(each["node"], each["name"]) for each in data["bitmaps"]]
        for source in sources:
            target.mark(source.dirty)

    def _back_up(self, data: Action) -> None:
        name = data.get("bitmap")
        bitmap = None if name is None else self._usable(data["device"], name)
        targets = {job.target for job in self.jobs.values()}
        if data["job-id"] in self.jobs or data["target"] in targets or data["speed"] < 0:
            raise RefusedError
        self.jobs[data["job-id"]] = Job(
            data["device"], data["target"], name, data.get("bitmap-mode")
        )
        if bitmap is not None:
            bitmap.taken = True

    def commit(self) -> None:
        """All have taken effect, and every job succeeds."""
        for disk, name in self.removed:
            del self.bitmaps[disk][name]
        self.removed = []
        for job in self.jobs.values():
            if job.bitmap is not None:
                bitmap = self.bitmaps[job.device][job.bitmap]
                bitmap.taken = False
                if job.mode != "never":
                    bitmap.dirty = set()
        self.jobs = {}

    def attempt(self, actions: list[Action]) -> Model | None:
        """The model after a transaction, or None where that is refused."""
        after = deepcopy(self)
        try:
            for each in actions:
                after.apply(each)
        except RefusedError:
            return None
        after.commit()
        return after

    def rehearse(self, actions: list[Action]) -> list[bool]:
        """Which actions would take effect."""
        trial, results = deepcopy(self), []
        for each in actions:
            try:
                trial.apply(each)
                results.append(True)
            except RefusedError:
                results.append(False)
        return results

    def write(self, disk: str, sectors: set[int]) -> None:
        for bitmap in self.bitmaps[disk].values():
            if bitmap.recording:
                bitmap.mark(sectors)

    def told(self) -> dict[str, Any]:
        return {
            disk: {
                name: (bitmap.granularity, bitmap.recording, False, frozenset(bitmap.dirty))
                for name, bitmap in bitmaps.items()
            }
            for disk, bitmaps in self.bitmaps.items()
        }


def told(rig: CommandRig) -> dict[str, Any]:
    """The same of the daemon."""
    return {
        disk: {
            bitmap.name: (
                bitmap.granularity_bytes,
                bitmap.recording,
                bitmap.busy,
                frozenset(
                    sector
                    for extent in bitmap.copy_bits().extents()
                    for sector in range(extent.offset // SECTOR, extent.end // SECTOR)
                ),
            )
            for bitmap in rig.nodes[disk].bitmaps.list()
        }
        for disk in DISKS
    }


NAMES = st.sampled_from("ab")
BITMAPS = st.fixed_dictionaries({"node": st.sampled_from(DISKS), "name": NAMES})


def on_bitmap(command: str, **more: Any) -> st.SearchStrategy[Action]:
    data = st.builds(lambda bitmap, rest: bitmap | rest, BITMAPS, st.fixed_dictionaries(more))
    return data.map(lambda data: {"type": f"block-dirty-bitmap-{command}", "data": data})


@st.composite
def backups(draw: st.DrawFn) -> Action:
    data: Action = {
        "job-id": draw(st.sampled_from("jk")),
        "device": draw(st.sampled_from(DISKS)),
        "target": draw(st.sampled_from(TARGETS)),
        "sync": draw(st.sampled_from(["full", "incremental", "bitmap"])),
        "speed": draw(st.sampled_from([0, 0, 0, -1])),
    }
    if data["sync"] != "full" or draw(st.booleans()):
        modes = {"full": ["on-success", "always"], "incremental": ["on-success"]}
        choice = modes.get(data["sync"], ["on-success", "always", "never"])
        data |= {"bitmap": draw(NAMES), "bitmap-mode": draw(st.sampled_from(choice))}
    return {"type": "blockdev-backup", "data": data}


ACTIONS = st.one_of(
    on_bitmap("add", granularity=st.sampled_from([512, 2048]), disabled=st.booleans()),
    on_bitmap("remove"),
    on_bitmap("clear"),
    on_bitmap("enable"),
    on_bitmap("disable"),
    st.builds(
        lambda into, sources: action(
            "block-dirty-bitmap-merge", node=into["node"], target=into["name"], bitmaps=sources
        ),
        BITMAPS,
        st.lists(BITMAPS, max_size=2),
    ),
    backups(),
)
WRITES = st.tuples(
    st.sampled_from(DISKS), st.integers(0, SIZE // SECTOR - 1), st.integers(1, 4)
).map(lambda drawn: (drawn[0], drawn[1], min(drawn[2], SIZE // SECTOR - drawn[1])))
STEPS = st.lists(st.tuples(st.lists(WRITES, max_size=3), st.lists(ACTIONS, max_size=5)), max_size=6)


async def write(rig: CommandRig, model: Model, writes: list[tuple[str, int, int]]) -> None:
    for disk, first, count in writes:
        await rig.write(disk, first * SECTOR, count * SECTOR)
        model.write(disk, set(range(first, first + count)))


async def is_refused(rig: CommandRig, actions: list[Action], *, grouped: bool) -> bool:
    try:
        await rig.transact(*actions, grouped=grouped)
    except BlockdError:
        return True
    for job in rig.jobs.newest_first():
        await job.wait_concluded()
        assert job.error is None
    return False


async def check_failures(rig: CommandRig, model: Model, actions: list[Action]) -> None:
    """Wherever the transaction fails, it leaves everything as it was, also for later writes."""
    for end in range(len(actions) + 1):
        before = rig.state()
        assert await is_refused(rig, [*actions[:end], action("abort")], grouped=False)
        assert rig.state() == before
        # One that is cancelled where it waits has not begun.
        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.transact(*actions[:end])
        assert rig.state() == before
        await write(rig, model, [("n", end, 1), ("m", 2 * end, 1)])
        assert told(rig) == model.told()


async def check(steps: list[tuple[Any, list[Action]]], *, grouped: bool, cached: bool) -> None:
    drivers = {name: MemoryDriver(SIZE) for name in (*DISKS, *TARGETS)}
    for driver in drivers.values():
        driver.nowait = lambda _: cached
    model = Model()
    async with command_rig(**drivers) as rig:
        for disk in DISKS:
            added = action(
                "block-dirty-bitmap-add", node=disk, name="a", granularity=SECTOR, disabled=False
            )
            model.apply(added)
            await rig.transact(added)
        for writes, actions in steps:
            await write(rig, model, writes)
            await check_failures(rig, model, actions)
            before = rig.state()
            errors = await rig.rehearse(*actions, grouped=grouped)
            assert [error is None for error in errors] == model.rehearse(actions)
            assert rig.state() == before
            after = model.attempt(actions)
            assert await is_refused(rig, actions, grouped=grouped) == (after is None)
            assert after is not None or rig.state() == before
            model = after or model
            assert told(rig) == model.told()


@settings(deadline=None)
@given(steps=STEPS, grouped=st.booleans(), cached=st.booleans())
def test_all_or_nothing(
    steps: list[tuple[Any, list[Action]]], *, grouped: bool, cached: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_limits(monkeypatch)
        trio.run(lambda: check(steps, grouped=grouped, cached=cached))
