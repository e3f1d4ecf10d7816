"""What clients hear of storage that was away with what they had not flushed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.nbd.wire import CmdFlag, Errno
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import NbdError
from tests.helpers.nbd_server import DISK_BYTES, in_thread, serving
from tests.helpers.watched_driver import WatchedDriver


def check_flush_fails_once(client: NbdClient) -> None:
    with pytest.raises(NbdError) as raised:
        client.flush()
    assert raised.value.code == Errno.EIO
    client.flush()


async def test_each_client_hears_of_a_doubt_once(tmp_path: Path) -> None:
    """At a flush, which is a promise; not at a write that is flushed alone."""
    driver = WatchedDriver(DISK_BYTES)
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        clients = [await rig.client() for _ in range(2)]

        def before() -> None:
            for client in clients:
                client.write(0, b"x")
                client.flush()

        def after() -> None:
            clients[0].write(0, b"y", CmdFlag.FUA)
            for client in clients:
                check_flush_fails_once(client)

        await in_thread(before)
        driver.doubts = 1
        await in_thread(after)
        late = await rig.client()
        await in_thread(late.flush)
        driver.doubts = 3
        await in_thread(lambda: check_flush_fails_once(late))


CHANGES: dict[str, Callable[[NbdClient], None]] = {
    "a write": lambda client: client.write(0, b"x", CmdFlag.FUA),
    "a large write": lambda client: client.write(0, bytes(300_000), CmdFlag.FUA),
    "zeroes": lambda client: client.write_zeroes(0, 512, CmdFlag.FUA),
    "a discard": lambda client: client.trim(0, 512, CmdFlag.FUA),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_that_is_lost_before_its_own_flush_fails(tmp_path: Path, what: str) -> None:
    """A flush succeeds at a server that has come back without what was written before it."""
    driver = WatchedDriver(DISK_BYTES)

    def lose(operation: str) -> None:
        driver.doubts += operation == "flush"

    driver.on_begin = lose
    async with serving(tmp_path) as rig:
        rig.export(rig.node("disk", driver))
        client = await rig.client()

        def change() -> None:
            with pytest.raises(NbdError) as raised:
                CHANGES[what](client)
            assert raised.value.code == Errno.EIO

        await in_thread(change)
        driver.on_begin = lambda _: None
        await in_thread(lambda: CHANGES[what](client))
