"""Every NBD command, as a real client sends it, on drivers that are quick and on ones that wait."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from blockd import limits
from blockd.block import Node
from blockd.extent import Extent
from blockd.nbd.wire import Cmd, CmdFlag, Errno, TransmissionFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, NbdError
from tests.helpers.nbd_server import DISK_BYTES, Rig, in_thread, serving
from tests.helpers.watched_driver import WatchedDriver

MIB = 1024 * 1024
#: Room for a request of the largest size beside others.
LARGE_BYTES = 40 * MIB


@pytest.fixture(params=["inline", "waiting"])
def driver(request: pytest.FixtureRequest) -> WatchedDriver:
    driver = WatchedDriver(DISK_BYTES)
    driver.nowait = lambda _: request.param == "inline"
    return driver


@pytest.fixture(params=["simple", "structured"])
def structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "structured")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        yield rig


@pytest.fixture
def node(rig: Rig, driver: WatchedDriver) -> Node:
    node = rig.node("disk", driver)
    rig.export(node)
    return node


@pytest.fixture
async def client(rig: Rig, node: Node, *, structured: bool) -> NbdClient:
    return await rig.client(structured=structured)


def refusal(call: Callable[[], object]) -> tuple[Errno, str]:
    with pytest.raises(NbdError) as raised:
        call()
    assert isinstance(raised.value.code, Errno)
    return raised.value.code, raised.value.message


def run(client: NbdClient, call: Call) -> bytes:
    return client.wait(client.submit(call))


# --- what works -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 511, 4096, 262_144, 262_145, DISK_BYTES])
async def test_what_is_written_is_read(
    client: NbdClient, driver: WatchedDriver, length: int
) -> None:
    data = random.Random(length).randbytes(length)
    offset = DISK_BYTES - length

    def converse() -> None:
        client.write(offset, data)
        assert client.read(offset, length) == data

    await in_thread(converse)
    assert driver.data == bytes(offset) + data


async def test_zeroes_and_discards(client: NbdClient, driver: WatchedDriver, node: Node) -> None:
    bitmap = node.bitmaps.add("b", 512)
    driver.data[:] = b"x" * DISK_BYTES

    def converse() -> None:
        client.write_zeroes(512, 1000)
        client.write_zeroes(4096, 1000, CmdFlag.NO_HOLE)
        client.trim(8192, 512)

    await in_thread(converse)
    assert driver.data[512:1512] == bytes(1000)
    assert driver.data[4096:5096] == bytes(1000)
    assert driver.seen == ["write_zeroes", "write_zeroes", "discard"]
    assert list(bitmap.usable_bits().extents()) == [
        Extent(512, 1024),
        Extent(4096, 1024),
        Extent(8192, 512),
    ]


async def test_every_change_with_fua_is_flushed_before_its_reply(
    client: NbdClient, driver: WatchedDriver
) -> None:
    def converse() -> None:
        client.write(0, b"x" * 512, CmdFlag.FUA)
        assert driver.durable[:512] == b"x" * 512
        client.write(0, b"y" * 300_000, CmdFlag.FUA)
        assert driver.durable[:300_000] == b"y" * 300_000
        client.write_zeroes(0, 512, CmdFlag.FUA)
        assert driver.durable[:512] == bytes(512)
        client.trim(0, 512, CmdFlag.FUA)

    await in_thread(converse)
    assert driver.counts["flush"] == 4
    assert driver.seen[-1] == "flush"


async def test_a_flush_makes_what_was_written_durable(
    client: NbdClient, driver: WatchedDriver
) -> None:
    def converse() -> None:
        client.write(100, b"data")
        client.flush()
        assert driver.durable[100:104] == b"data"

    await in_thread(converse)


async def test_a_writethrough_export_flushes_every_change(
    rig: Rig, driver: WatchedDriver, *, structured: bool
) -> None:
    rig.export(rig.node("safe", driver), writethrough=True)
    client = await rig.client("safe", structured=structured)

    def converse() -> None:
        client.write(0, b"x" * 512)
        assert driver.durable[:512] == b"x" * 512
        client.write(0, b"y" * 300_000)
        assert driver.durable[:300_000] == b"y" * 300_000
        assert client.read(0, 512) == b"y" * 512

    await in_thread(converse)


async def test_requests_of_no_length_do_nothing_and_succeed(
    client: NbdClient, driver: WatchedDriver
) -> None:
    def converse() -> None:
        assert client.read(DISK_BYTES, 0) == b""
        client.write(0, b"")
        client.write_zeroes(0, 0)
        client.trim(0, 0)

    await in_thread(converse)
    assert driver.seen == []


async def test_the_largest_requests_work(rig: Rig, *, structured: bool) -> None:
    driver = WatchedDriver(LARGE_BYTES)
    rig.export(rig.node("large", driver))
    client = await rig.client("large", structured=structured)
    data = random.Random(0).randbytes(limits.NBD_PAYLOAD_BYTES)

    def converse() -> None:
        client.write(1000, data)
        assert client.read(1000, len(data)) == data

    await in_thread(converse)


async def test_a_large_read_takes_no_large_piece_of_memory(rig: Rig) -> None:
    driver = WatchedDriver(LARGE_BYTES)
    rig.export(rig.node("large", driver))
    client = await rig.client("large")
    await in_thread(lambda: client.read(1000, limits.NBD_PAYLOAD_BYTES))
    assert max(extent.length for extent in driver.reads) <= limits.NBD_READ_PIECE_BYTES


@pytest.mark.parametrize("nth", [1, 3, 5])
async def test_a_large_read_that_fails_midway_has_no_data(
    rig: Rig, nth: int, *, structured: bool
) -> None:
    driver = WatchedDriver(LARGE_BYTES)
    rig.export(rig.node("large", driver))
    client = await rig.client("large", structured=structured)
    driver.fail("read", errno.EIO, nth=nth)

    def converse() -> None:
        assert refusal(lambda: client.read(0, 5 * MIB))[0] == Errno.EIO
        assert client.read(0, 5 * MIB) == bytes(5 * MIB)

    await in_thread(converse)


async def test_a_client_says_goodbye_after_its_last_answer(
    client: NbdClient, driver: WatchedDriver
) -> None:
    def converse() -> None:
        cookie = client.submit(Call(Cmd.WRITE, 0, data=b"last"))
        client.send(bytes.fromhex("25609513 0000 0002") + bytes(20))
        client.wait(cookie)
        assert client.at_end()

    await in_thread(converse)
    assert driver.data[:4] == b"last"


# --- what is refused --------------------------------------------------------------------------

OUT_OF_RANGE = [
    (Call(Cmd.READ, DISK_BYTES - 1, 2), Errno.EINVAL),
    (Call(Cmd.READ, 2**64 - 1, 1), Errno.EINVAL),
    (Call(Cmd.WRITE, DISK_BYTES - 1, data=b"xy"), Errno.ENOSPC),
    (Call(Cmd.WRITE, DISK_BYTES, data=b"x" * 300_000), Errno.ENOSPC),
    (Call(Cmd.WRITE_ZEROES, 1, DISK_BYTES), Errno.ENOSPC),
    (Call(Cmd.TRIM, DISK_BYTES, 1), Errno.EINVAL),
    (Call(Cmd.CACHE, DISK_BYTES, 1), Errno.EINVAL),
]


@pytest.mark.parametrize(("call", "code"), OUT_OF_RANGE)
async def test_what_lies_out_of_range_is_refused(
    client: NbdClient, driver: WatchedDriver, call: Call, code: Errno
) -> None:
    def converse() -> None:
        assert refusal(lambda: run(client, call))[0] == code
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)
    assert driver.seen == ["read"]


UNKNOWN = [
    Call(Cmd.CACHE, 0, 512, CmdFlag.DF),
    Call(Cmd.BLOCK_STATUS, 0, 512),
    Call(77, 2**64 - 1, 2**32 - 1),
    Call(Cmd.READ, 0, 512, CmdFlag.NO_HOLE),
    Call(Cmd.WRITE, flags=CmdFlag.DF, data=b"x" * 512),
    Call(Cmd.WRITE, flags=1 << 15, data=b"x" * 300_000),
    Call(Cmd.TRIM, 0, 512, CmdFlag.NO_HOLE),
    Call(Cmd.WRITE_ZEROES, 0, 512, CmdFlag.PAYLOAD_LEN),
    Call(Cmd.FLUSH, flags=CmdFlag.REQ_ONE),
]


@pytest.mark.parametrize("call", UNKNOWN)
async def test_unknown_commands_and_flags_are_refused(
    client: NbdClient, driver: WatchedDriver, call: Call
) -> None:
    def converse() -> None:
        assert refusal(lambda: run(client, call))[0] == Errno.EINVAL
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)
    assert driver.seen == ["read"]


async def test_a_read_that_is_too_large_is_refused(client: NbdClient, *, structured: bool) -> None:
    def converse() -> None:
        length = limits.NBD_PAYLOAD_BYTES + 1
        code, message = refusal(lambda: client.read(0, length))
        assert code == Errno.EINVAL
        if structured:
            assert message == "len (33554433) is larger than max len (33554432)"
        assert client.read(0, 4) == bytes(4)

    await in_thread(converse)


async def test_a_write_that_is_too_large_ends_its_connection_alone(
    rig: Rig, client: NbdClient
) -> None:
    other = await rig.client()

    def converse() -> None:
        request = bytes.fromhex("25609513 0000 0001") + bytes(16) + (33 * MIB).to_bytes(4)
        client.send(request)
        assert client.at_end()
        assert other.read(0, 4) == bytes(4)

    await in_thread(converse)


CHANGES = [
    Call(Cmd.WRITE, data=b"x"),
    Call(Cmd.WRITE, data=b"x" * 300_000),
    Call(Cmd.WRITE_ZEROES, 0, 512),
    Call(Cmd.TRIM, 0, 512),
]


async def test_a_read_only_export_takes_no_changes(
    rig: Rig, driver: WatchedDriver, *, structured: bool
) -> None:
    rig.export(rig.node("ro", driver), writable=False)

    def converse() -> None:
        with NbdClient.open(rig.path, "ro", structured=structured) as client:
            for call in CHANGES:
                text = "Export is read-only" if structured else ""
                assert refusal(partial(run, client, call)) == (Errno.EPERM, text)
            client.flush()
            assert client.read(0, 4) == bytes(4)

    await in_thread(converse)
    assert "write" not in driver.seen


# --- what the disk can not do -----------------------------------------------------------------

FAILURES = [
    ("read", Call(Cmd.READ, 0, 512)),
    ("read", Call(Cmd.READ, 0, 300_000)),
    ("write", Call(Cmd.WRITE, data=b"x" * 512)),
    ("write", Call(Cmd.WRITE, data=b"x" * 300_000)),
    ("write", Call(Cmd.WRITE, flags=CmdFlag.FUA, data=b"x" * 512)),
    ("flush", Call(Cmd.WRITE, flags=CmdFlag.FUA, data=b"x" * 512)),
    ("flush", Call(Cmd.WRITE, flags=CmdFlag.FUA, data=b"x" * 300_000)),
    ("write_zeroes", Call(Cmd.WRITE_ZEROES, 0, 512)),
    ("discard", Call(Cmd.TRIM, 0, 512)),
    ("flush", Call(Cmd.FLUSH)),
]
NUMBERS = [
    (errno.EIO, Errno.EIO, "Input/output error"),
    (errno.ENOSPC, Errno.ENOSPC, "No space left on device"),
    (errno.EFBIG, Errno.ENOSPC, "File too large"),
    (errno.EROFS, Errno.EPERM, "Read-only file system"),
    (errno.EILSEQ, Errno.EINVAL, "Invalid or incomplete multibyte or wide character"),
]


@pytest.mark.parametrize(("operation", "call"), FAILURES)
async def test_an_error_of_the_disk_reaches_the_client(
    client: NbdClient, driver: WatchedDriver, operation: str, call: Call, *, structured: bool
) -> None:
    # An inline call that fails is tried once more in a task, and fails again.
    driver.fail(operation, errno.EIO, times=2)

    def converse() -> None:
        text = "Input/output error" if structured else ""
        assert refusal(lambda: run(client, call)) == (Errno.EIO, text)

    await in_thread(converse)


@pytest.mark.parametrize(("number", "code", "message"), NUMBERS)
async def test_errors_become_the_nearest_that_nbd_has(
    rig: Rig, number: int, code: Errno, message: str
) -> None:
    driver = WatchedDriver(DISK_BYTES)
    rig.export(rig.node("disk", driver))
    driver.fail("write", number)
    client = await rig.client()

    def converse() -> None:
        assert refusal(lambda: client.write(0, b"x")) == (code, message)
        client.write(0, b"x")

    await in_thread(converse)


# --- what is advertised -----------------------------------------------------------------------


async def test_what_an_export_says_of_itself(rig: Rig) -> None:
    node = rig.node("disk")
    rig.export(node, description="the system disk")
    rig.export(node, "ro", writable=False)

    def converse() -> None:
        with NbdClient.connect(rig.path) as client:
            plain = client.info("disk", 1, 2, 3)
            assert plain.size_bytes == DISK_BYTES
            assert plain.description == "the system disk"
            assert plain.block_sizes == (1, 4096, limits.NBD_PAYLOAD_BYTES)
            assert not plain.flags & TransmissionFlag.SEND_DF
            client.structured_replies()
            flags = TransmissionFlag(client.info("disk").flags)
            assert flags == (
                TransmissionFlag.HAS_FLAGS
                | TransmissionFlag.SEND_FLUSH
                | TransmissionFlag.SEND_FUA
                | TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_DF
                | TransmissionFlag.CAN_MULTI_CONN
                | TransmissionFlag.SEND_CACHE
                | TransmissionFlag.SEND_FAST_ZERO
            )
            flags = TransmissionFlag(client.info("ro").flags)
            assert flags & TransmissionFlag.READ_ONLY
            assert not flags & TransmissionFlag.SEND_TRIM
            assert not flags & TransmissionFlag.SEND_WRITE_ZEROES
            assert not flags & TransmissionFlag.SEND_FAST_ZERO

    await in_thread(converse)
