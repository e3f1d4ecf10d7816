"""Extended headers and holes: what large and empty requests become."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd import limits
from blockd.nbd.wire import Cmd, CmdFlag, Errno
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_server import DISK_BYTES, Rig, in_thread, serving
from tests.helpers.watched_driver import WatchedDriver

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        yield rig


@pytest.fixture(params=["inline", "waiting"])
def driver(request: pytest.FixtureRequest) -> WatchedDriver:
    driver = WatchedDriver(DISK_BYTES)
    driver.nowait = lambda _: request.param == "inline"
    return driver


@pytest.fixture(params=[False, True], ids=["structured", "extended"])
def extended(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_every_command_by_extended_headers(rig: Rig, driver: WatchedDriver) -> None:
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=True)
    data = random.Random(1).randbytes(300_000)

    def converse() -> None:
        client.write(512, data)
        client.write(0, b"short", CmdFlag.FUA)
        assert client.read(0, 5) == b"short"
        assert client.read(512, len(data)) == data
        assert client.read(512, 4096, CmdFlag.DF) == data[:4096]
        client.trim(0, 512)
        client.write_zeroes(512, 512)
        assert client.read(512, 512) == bytes(512)
        client.cache(0, DISK_BYTES)
        client.flush()
        assert client.read(0, 0) == b""
        client.disconnect()

    await in_thread(converse)


async def test_replies_in_flight_by_extended_headers(rig: Rig, driver: WatchedDriver) -> None:
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=True)
    randoms = random.Random(2)
    blocks = [randoms.randbytes(4096) for _ in range(200)]
    writes = [Call(Cmd.WRITE, 4096 * n, data=block) for n, block in enumerate(blocks)]
    reads = [Call(Cmd.READ, 4096 * n, 4096) for n in range(200)]

    def converse() -> None:
        assert client.pipeline(writes) == [b""] * 200
        assert client.pipeline(reads) == blocks

    await in_thread(converse)


async def test_lengths_beyond_32_bits(rig: Rig) -> None:
    driver = Endless(1)
    driver.size_bytes = 1 << 44
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=True)

    def converse() -> None:
        client.write_zeroes(0, 1 << 44)
        client.trim(512, (1 << 43) + 512)
        with pytest.raises(NbdError, match="operation past EOF"):
            client.trim(1 << 43, (1 << 43) + 1)
        with pytest.raises(NbdError, match="is larger than max len"):
            client.read(0, 1 << 33)
        with pytest.raises(NbdError, match="is larger than max len"):
            client.cache(0, 1 << 33)

    await in_thread(converse)
    assert driver.changed == [("write_zeroes", 0, 1 << 44), ("discard", 512, (1 << 43) + 512)]


class Endless(WatchedDriver):
    """As large as it says, for who changes nothing but in bulk."""

    def __init__(self, content: int) -> None:
        super().__init__(content)
        self.changed: list[tuple[str, int, int]] = []

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.changed.append(("write_zeroes", offset, length))

    async def discard(self, offset: int, length: int) -> None:
        self.changed.append(("discard", offset, length))


PAYLOADS = [
    Call(Cmd.READ, 0, data=b"x" * 10),
    Call(Cmd.FLUSH, 0, data=b"x" * 10),
    Call(Cmd.TRIM, 0, data=b"x" * 300_000),
    Call(Cmd.WRITE_ZEROES, 0, data=b"x" * 10),
    Call(77, 0, data=b"x" * 10),
]


@pytest.mark.parametrize("call", PAYLOADS)
async def test_payloads_that_nobody_asked_for_are_read_over(rig: Rig, call: Call) -> None:
    rig.export(rig.node("disk"))
    client = await rig.client(extended=True)

    def converse() -> None:
        with pytest.raises(NbdError) as raised:
            client.wait(client.submit(call))
        assert raised.value.code == Errno.EINVAL
        client.write(0, b"still there")
        assert client.read(0, 11) == b"still there"

    await in_thread(converse)


async def test_unknown_flags_beside_a_payload_are_refused(rig: Rig, driver: WatchedDriver) -> None:
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=True)

    def converse() -> None:
        with pytest.raises(NbdError, match=r"flags for command write \(got 0x8020\)"):
            client.write(0, b"x", 1 << 15)
        assert client.read(0, 1) == b"\0"

    await in_thread(converse)


async def test_a_write_that_forgot_to_say_so_has_a_payload(rig: Rig) -> None:
    """As the peer takes it; the specification leaves it open."""
    rig.export(rig.node("disk"))
    client = await rig.client(extended=True)

    def converse() -> None:
        cookie = client.submit(Call(Cmd.WRITE, 0, length=4))
        client.send(b"data")
        client.wait(cookie)
        assert client.read(0, 4) == b"data"

    await in_thread(converse)


# --- holes ------------------------------------------------------------------------------------

LENGTHS = [15, 16, 512, 64 * KIB, 64 * KIB + 1, DISK_BYTES]


def chunk_types(client: NbdClient, call: Call) -> set[int]:
    """The types of the chunks that answer a READ."""
    cookie = client.submit(call)
    pending = client.pending(cookie)
    client.wait(cookie)
    return pending.kinds


@pytest.mark.parametrize("length", LENGTHS)
async def test_zeroes_are_holes_for_those_who_understand_them(
    rig: Rig, driver: WatchedDriver, length: int, *, extended: bool
) -> None:
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=extended)

    def converse() -> None:
        small = length < 16 and driver.nowait("read")
        expected = {1 if small else 2}
        assert chunk_types(client, Call(Cmd.READ, 0, length)) == expected
        assert chunk_types(client, Call(Cmd.READ, 0, length, CmdFlag.DF)) == {1}
        client.write(length - 1, b"x")
        assert client.read(0, length) == bytes(length - 1) + b"x"
        assert chunk_types(client, Call(Cmd.READ, 0, length, CmdFlag.DF)) == {1}

    await in_thread(converse)


@pytest.mark.parametrize("seed", range(5))
async def test_data_among_zeroes_in_a_large_read(rig: Rig, seed: int, *, extended: bool) -> None:
    driver = WatchedDriver(4 * MIB)
    randoms = random.Random(seed)
    for _ in range(randoms.randrange(6)):
        at = randoms.randrange(4 * MIB)
        piece = randoms.randbytes(randoms.randrange(1, 300 * KIB))
        driver.data[at : at + len(piece)] = piece[: 4 * MIB - at]
    rig.export(rig.node("disk", driver))
    client = await rig.client(extended=extended)

    def converse() -> None:
        offset = randoms.randrange(MIB)
        assert client.read(offset, 3 * MIB) == driver.data[offset : offset + 3 * MIB]
        assert client.read(0, 4 * MIB, CmdFlag.DF) == driver.data

    await in_thread(converse)


# --- fast zeroes, caching ---------------------------------------------------------------------


async def test_fast_zeroes_are_refused_where_they_are_slow(rig: Rig) -> None:
    driver = WatchedDriver(DISK_BYTES)
    rig.export(rig.node("disk", driver))
    client = await rig.client()

    def converse() -> None:
        with pytest.raises(NbdError) as raised:
            client.write_zeroes(0, 512, CmdFlag.FAST_ZERO)
        assert raised.value.code == Errno.ENOTSUP

    await in_thread(converse)
    assert driver.seen == []


async def test_fast_zeroes_where_the_driver_has_them(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = WatchedDriver(DISK_BYTES)
    monkeypatch.setattr(driver, "zeroes_fast", lambda offset, length, *, unmap: unmap)
    rig.export(rig.node("disk", driver))
    client = await rig.client()

    def converse() -> None:
        client.write_zeroes(0, 512, CmdFlag.FAST_ZERO)
        with pytest.raises(NbdError) as raised:
            client.write_zeroes(0, 512, CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE)
        assert raised.value.code == Errno.ENOTSUP

    await in_thread(converse)


async def test_what_is_to_be_cached_is_read(rig: Rig, driver: WatchedDriver) -> None:
    driver.data += bytes(2 * MIB)
    driver.size_bytes += 2 * MIB
    rig.export(rig.node("disk", driver))
    client = await rig.client()
    await in_thread(lambda: client.cache(512, DISK_BYTES + MIB))
    assert sum(extent.length for extent in driver.reads) == DISK_BYTES + MIB
    driver.fail("read", errno.EIO)

    def converse() -> None:
        with pytest.raises(NbdError) as raised:
            client.cache(0, limits.MIB)
        assert raised.value.code == Errno.EIO

    await in_thread(converse)
