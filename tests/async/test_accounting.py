"""What nodes count: every request of a guest once, whichever way it takes."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.block import Accounts, Node, RawDriver
from blockd.nbd.wire import Cmd
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_server import DISK_BYTES, Rig, in_thread, serving
from tests.helpers.watched_driver import ANSWERS, WatchedDriver

WINDOW_OFFSET = 4096
CALLS = 1200


@pytest.fixture(params=ANSWERS)
def driver(request: pytest.FixtureRequest) -> WatchedDriver:
    driver = WatchedDriver(DISK_BYTES)
    driver.filename = "/disk.img"
    driver.answer(request.param)
    return driver


@pytest.fixture
async def rig(tmp_path: Path, driver: WatchedDriver) -> AsyncIterator[Rig]:
    """``disk`` is a window into ``below``, and exported."""
    async with serving(tmp_path) as rig:
        below = rig.node("below", driver)
        disk = rig.graph.add("disk", RawDriver(below, offset_bytes=WINDOW_OFFSET), owned=True)
        rig.export(disk)
        yield rig
        await rig.close()
        await rig.graph.remove(disk)


def counted(rig: Rig, name: str) -> Accounts:
    return rig.graph.accounts(rig.graph.get(name))


def brief(accounts: Accounts) -> dict[str, tuple[int, int]]:
    kinds = {"read": accounts.read, "write": accounts.write, "unmap": accounts.unmap}
    brief = {name: (counts.operations, counts.total_bytes) for name, counts in kinds.items()}
    return {**brief, "flush": (accounts.flush.operations, accounts.highest)}


def some_calls(rng: random.Random, size: int) -> list[Call]:
    calls = []
    for _ in range(CALLS):
        length = rng.choice([1, 512, 4096, rng.randint(1, 9000)])
        offset = rng.randrange(size - length)
        match rng.choice([Cmd.READ] * 4 + [Cmd.WRITE] * 4 + [Cmd.TRIM, Cmd.WRITE_ZEROES]):
            case Cmd.WRITE:
                calls.append(Call(Cmd.WRITE, offset, data=rng.randbytes(length)))
            case kind:
                calls.append(Call(kind, offset, length))
    return [*calls, Call(Cmd.FLUSH)]


def expected(calls: list[Call], *, shift: int) -> dict[str, tuple[int, int]]:
    def total(*kinds: Cmd) -> tuple[int, int]:
        lengths = [call.length or len(call.data) for call in calls if call.cmd in kinds]
        return len(lengths), sum(lengths)

    writes = [call for call in calls if call.cmd in (Cmd.WRITE, Cmd.WRITE_ZEROES)]
    highest = max(call.offset + (call.length or len(call.data)) for call in writes)
    return {
        "read": total(Cmd.READ),
        "write": total(Cmd.WRITE, Cmd.WRITE_ZEROES),
        "unmap": total(Cmd.TRIM),
        "flush": (total(Cmd.FLUSH)[0], highest + shift),
    }


@pytest.mark.parametrize("structured", [False, True])
async def test_every_request_counts_once_on_each_level(rig: Rig, *, structured: bool) -> None:
    client = await rig.client(structured=structured)
    calls = some_calls(random.Random(3), DISK_BYTES - WINDOW_OFFSET)
    await in_thread(lambda: client.pipeline(calls, depth=40))
    assert brief(counted(rig, "disk")) == expected(calls, shift=0)
    assert brief(counted(rig, "below")) == expected(calls, shift=WINDOW_OFFSET)
    for name in ("disk", "below"):
        total = counted(rig, name)
        assert total.read.time_ns > 0
        assert total.write.time_ns > 0
        kinds = (total.read, total.write, total.unmap, total.flush)
        assert not any(kind.failed or kind.invalid for kind in kinds)


async def test_a_large_request_counts_in_pieces(rig: Rig) -> None:
    client = await rig.client()
    length = 2 * limits.NBD_STREAM_BYTES + 5
    await in_thread(lambda: client.write(0, bytes(length)))
    total = counted(rig, "disk")
    assert total.write.total_bytes == length
    assert total.write.operations >= 3
    assert total.highest == length


async def test_what_is_refused_or_fails_counts_apart(rig: Rig, driver: WatchedDriver) -> None:
    client = await rig.client()
    refused = [
        Call(Cmd.READ, DISK_BYTES, 1),
        Call(Cmd.WRITE, DISK_BYTES, data=b"x"),
        Call(Cmd.WRITE_ZEROES, DISK_BYTES, 1),
        Call(Cmd.TRIM, DISK_BYTES, 1),
        Call(Cmd.FLUSH, flags=1 << 9),
        Call(99),
    ]
    results = await in_thread(lambda: client.pipeline(refused))
    assert all(isinstance(result, NbdError) for result in results)
    for operation in ("read", "write", "discard", "flush"):
        driver.fail(operation, errno.EIO, times=2)
    failing = [
        Call(Cmd.READ, 0, 1),
        Call(Cmd.WRITE, 0, data=b"x"),
        Call(Cmd.TRIM, 0, 1),
        Call(Cmd.FLUSH),
    ]
    results = await in_thread(lambda: client.pipeline(failing, depth=1))
    driver.heal()
    assert all(isinstance(result, NbdError) for result in results)
    total = counted(rig, "disk")
    kinds = (total.read, total.write, total.unmap, total.flush)
    assert [kind.invalid for kind in kinds] == [1, 2, 1, 1]
    assert [kind.failed for kind in kinds] == [1, 1, 1, 1]
    assert [kind.operations for kind in kinds] == [0, 0, 0, 0]


async def test_a_cancelled_request_counts_nowhere() -> None:
    driver = WatchedDriver(4096)
    node = Node("disk", driver)
    with driver.hold("read") as hold:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read, 0, memoryview(bytearray(1)))
            await hold.reached.wait()
            nursery.cancel_scope.cancel()
    assert (node.accounts.read.operations, node.accounts.read.failed) == (0, 0)
