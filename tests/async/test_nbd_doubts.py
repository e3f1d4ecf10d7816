"""What clients hear of storage that was away with what they had not flushed."""

from __future__ import annotations

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
