"""Taking an export away: gently, or from under its clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.errors import BlockdError
from tests.helpers.nbd_codec import NbdError
from tests.helpers.nbd_server import (
    Rig,
    SlowDisk,
    in_thread,
    serving,
    slow_disk,
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        node = rig.node("disk")
        rig.export(node)
        rig.export(node, "other")
        yield rig


@pytest.fixture
async def slow(rig: Rig) -> SlowDisk:
    return await slow_disk(rig)


async def test_an_export_without_clients_goes_at_once(rig: Rig) -> None:
    await rig.server.remove("id-disk", hard=False)
    await rig.server.remove("id-other", hard=True)
    assert rig.deleted() == ["id-disk", "id-other"]
    assert rig.server.exports() == []
    assert not rig.graph.get("disk").users
    rig.export(rig.graph.get("disk"))


async def test_an_unknown_export(rig: Rig) -> None:
    with pytest.raises(BlockdError, match=r"^Export 'zz' is not found$"):
        await rig.server.remove("zz", hard=True)


async def test_a_client_is_in_the_way_until_it_leaves(rig: Rig) -> None:
    client = await rig.raw()
    with pytest.raises(BlockdError, match=r"^export 'id-disk' still in use$"):
        await rig.server.remove("id-disk", hard=False)
    assert rig.deleted() == []
    assert await client.read(0, 4) == bytes(4)
    second = await rig.raw()
    await client.close()
    await second.close()
    await rig.wait_until_alone()
    await rig.server.remove("id-disk", hard=False)
    assert rig.deleted() == ["id-disk"]


async def test_a_client_that_still_shakes_hands_is_not_in_the_way(rig: Rig) -> None:
    client = await rig.client("other")
    haggling = await in_thread(lambda: type(client).connect(rig.path))
    await in_thread(lambda: haggling.info("disk"))
    await rig.server.remove("id-disk", hard=False)

    def converse() -> None:
        with haggling, pytest.raises(NbdError, match="export 'disk' not present"):
            haggling.go("disk")

    await in_thread(converse)


async def test_a_hard_removal_cuts_its_own_clients_alone(rig: Rig) -> None:
    clients = [await rig.raw(), await rig.raw()]
    other = await rig.raw("other")
    await rig.server.remove("id-disk", hard=True)
    assert rig.deleted() == ["id-disk"]
    assert [await client.at_end() for client in clients] == [True, True]
    assert await other.read(0, 4) == bytes(4)


async def test_a_hard_removal_is_over_when_the_disk_is_done(rig: Rig, slow: SlowDisk) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.server.remove("id-slow", hard=True))
        await wait_all_tasks_blocked()
        assert rig.deleted() == []
        assert [export.shutting_down for export in rig.server.exports()] == [True, False, False]
        with pytest.raises(BlockdError, match="is not found"):
            await rig.server.remove("id-slow", hard=True)
        with pytest.raises(BlockdError, match="is already in use"):
            rig.server.check_id("id-slow")
        rig.server.check_name("slow")
        assert rig.server.find("slow") is None
        assert rig.graph.get("slow").users
        slow.hold.release()
    assert rig.deleted() == ["id-slow"]
    assert not rig.graph.get("slow").users
    assert slow.driver.data[:4] == b"data"


async def test_a_removal_that_is_cancelled_goes_on(rig: Rig, slow: SlowDisk) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.server.remove("id-slow", hard=True)
    assert rig.deleted() == []
    slow.hold.release()
    await rig.wait_until_alone()
    assert rig.deleted() == ["id-slow"]


async def test_a_removal_and_the_end_of_the_server_meet(rig: Rig, slow: SlowDisk) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.server.remove("id-slow", hard=True))
        await wait_all_tasks_blocked()
        nursery.start_soon(rig.server.stop)
        await wait_all_tasks_blocked()
        slow.hold.release()
    assert rig.deleted() == ["id-slow", "id-other", "id-disk"]


async def test_names_and_ids_are_taken_once(rig: Rig) -> None:
    with pytest.raises(BlockdError, match=r"^Block export id 'id-disk' is already in use$"):
        rig.server.check_id("id-disk")
    with pytest.raises(BlockdError, match=r"^NBD server already has export named 'disk'$"):
        rig.server.check_name("disk")
    assert [export.id for export in rig.server.exports()] == ["id-other", "id-disk"]
    assert rig.server.get("id-disk").name == "disk"
