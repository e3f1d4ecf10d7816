"""x-debug-block-dirty-bitmap-sha256 beside everything else that goes on."""

from __future__ import annotations

import threading
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd.bitmap import Bits
from blockd.block import Graph
from blockd.qmp.commands.bitmap import sha256
from blockd.qmp.services import Services
from blockd.qmp.types.bitmap import XDebugBlockDirtyBitmapSha256
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.patience import PATIENCE_SECONDS

SIZE = 1 << 20


class FewServices:
    """What the handler needs."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.digests = trio.Lock()


@pytest.fixture
def services() -> Services:
    services = FewServices()
    node = services.graph.add("n", MemoryDriver(bytes(SIZE)), owned=True)
    node.bitmaps.add("b", 4096).usable_bits().mark(0, 5000)
    return cast("Services", services)


ARGUMENTS = XDebugBlockDirtyBitmapSha256(node="n", name="b")


async def test_a_guest_writes_while_the_digest_is_made(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in one thread, and is that of the bits at the command."""
    bits = services.graph.get("n").bitmaps.get("b").usable_bits()
    before = bits.digest()
    begun, written, threads = threading.Event(), threading.Event(), list[int]()
    digest = Bits.digest

    def digest_after_the_write(self: Bits) -> str:
        threads.append(threading.get_ident())
        begun.set()
        written.wait(PATIENCE_SECONDS)
        return digest(self)

    monkeypatch.setattr(Bits, "digest", digest_after_the_write)
    answers: list[dict[str, str]] = []

    async def ask() -> None:
        answers.append(await sha256(services, ARGUMENTS))

    async with trio.open_nursery() as clients:
        clients.start_soon(ask)
        clients.start_soon(ask)
        await wait_all_tasks_blocked()
        assert begun.wait(PATIENCE_SECONDS)
        assert len(threads) == 1
        bits.mark(500_000, 1)
        written.set()
    assert threading.get_ident() not in threads
    assert answers == [{"sha256": before}, {"sha256": digest(bits)}]
