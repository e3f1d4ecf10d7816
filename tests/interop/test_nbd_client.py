"""The NBD client with servers of other people, also when they go away."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.block import Allocation, Node
from blockd.errors import BlockdError
from blockd.extent import Extent
from blockd.listener import InetAddress, UnixAddress
from blockd.nbd.client import NbdDriver, Target
from blockd.nbd.client.connecting import connect
from blockd.nbd.wire import Headers
from tests.helpers.nbd_process import NbdProcess, nbdkit, qemu_nbd, serving
from tests.helpers.tools import require_tool

SIZE = 4 * 1024 * 1024
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def target(process: NbdProcess, export: str = "") -> Target:
    return Target(UnixAddress(str(process.socket_path)), export)


async def open_driver(process: NbdProcess, tasks: trio.Nursery, *, delay: float = 0) -> NbdDriver:
    return await NbdDriver.open(
        target(process),
        tasks,
        read_only=False,
        auto_read_only=False,
        reconnect_delay_seconds=delay,
    )


async def test_requests_wait_for_a_server_that_comes_back(image: Path, tmp_path: Path) -> None:
    """Killed again and again under load; each write that was answered is there at the end."""
    rng = random.Random(1)
    model = bytearray(SIZE)
    with serving(qemu_nbd(image), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks, delay=60)
            written = 0

            async def write(slot: int) -> None:
                nonlocal written
                for _ in range(100):
                    at = (rng.randrange(SIZE // BLOCK // 8) * 8 + slot) * BLOCK
                    data = rng.randbytes(BLOCK)
                    await driver.write(at, memoryview(data))
                    model[at : at + BLOCK] = data
                    written += 1

            async with trio.open_nursery() as writers:
                for slot in range(8):
                    writers.start_soon(write, slot)
                for kill_at in (100, 300, 500):
                    while written < kill_at:
                        await trio.lowlevel.checkpoint()
                    process.kill()
                    process.start()
            view = memoryview(bytearray(SIZE))
            await driver.read(0, view)
            assert view == model
            assert driver.doubts == 3
            assert Node("n", driver).doubts == 3
            await driver.close()


async def test_a_flush_leaves_no_doubt(image: Path, tmp_path: Path) -> None:
    with serving(qemu_nbd(image), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks, delay=60)
            await driver.write(0, memoryview(b"x"))
            await driver.flush()
            process.kill()
            process.start()
            await driver.write(1, memoryview(b"y"))
            assert driver.doubts == 0
            process.kill()
            process.start()
            await driver.flush()
            assert driver.doubts == 1
            await driver.close()


async def test_without_a_delay_requests_fail_and_go_on_once_it_is_back(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(qemu_nbd(image), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks)
            process.kill()
            process.socket_path.unlink()
            for _ in range(2):
                with pytest.raises(OSError, match="is not there") as raised:
                    await driver.read(0, memoryview(bytearray(512)))
                assert raised.value.errno == errno.EIO
            process.start()
            monkeypatch.setattr(limits, "NBD_CLIENT_PAUSE_MAX_SECONDS", 0)
            await driver.read(0, memoryview(bytearray(512)))
            await driver.close()


async def test_another_disk_is_not_taken_for_the_old_one(image: Path, tmp_path: Path) -> None:
    with serving(qemu_nbd(image), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks)
            process.kill()
            image.write_bytes(bytes(SIZE // 2))
            process.start()
            with pytest.raises(OSError, match="has changed its size"):
                await driver.read(0, memoryview(bytearray(512)))
            await driver.close()


async def test_a_server_that_takes_less_is_not_gone_on_with(image: Path, tmp_path: Path) -> None:
    """Not with requests that were made for the old one, of 64 bits it may be."""
    with serving(qemu_nbd(image), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks)
            process.kill()
            with (
                serving(nbdkit("file", str(image)), tmp_path / "s"),
                pytest.raises(OSError, match="takes shorter requests than before"),
            ):
                await driver.write_zeroes(0, SIZE, unmap=True)
            await driver.close()


async def test_a_servers_errors_are_passed_on(tmp_path: Path) -> None:
    command = nbdkit("--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC")
    with serving([*command, "error-pwrite-rate=100%"], tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks)
            with pytest.raises(OSError, match="No space left on device"):
                await driver.write(0, memoryview(b"x" * 512))
            await driver.read(0, memoryview(bytearray(512)))
            await driver.close()


async def test_many_requests_are_with_the_server_at_once(tmp_path: Path) -> None:
    """Each takes half a second there; one after the other they would take two minutes."""
    command = nbdkit("--threads=64", "--filter=delay", "memory", str(SIZE), "rdelay=500ms")
    with serving(command, tmp_path / "s") as process, trio.fail_after(60):
        async with trio.open_nursery() as tasks:
            driver = await open_driver(process, tasks)
            async with trio.open_nursery() as readers:
                for at in range(256):
                    readers.start_soon(driver.read, at * 512, memoryview(bytearray(512)))
            await driver.close()


@pytest.mark.parametrize(
    ("export", "options", "message"),
    [
        ("nope", [], "Requested export not available"),
        ("x" * 5000, [], "export name too long to send to server"),
        ("", ["--read-only"], "Could not open image: Permission denied"),
    ],
)
async def test_what_a_server_refuses(
    export: str, options: list[str], message: str, image: Path, tmp_path: Path
) -> None:
    with serving(qemu_nbd(image, *options), tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            with pytest.raises(BlockdError, match=message):
                await NbdDriver.open(
                    target(process, export), tasks, read_only=False, auto_read_only=False
                )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (UnixAddress("/nowhere/s"), "Failed to connect to '/nowhere/s': No such file or directory"),
        (InetAddress("127.0.0.1", "1"), "Failed to connect to '127.0.0.1:1': Connection refused"),
        (UnixAddress("/" + "s" * 107), "UNIX socket path '/s*' is too long"),
        (InetAddress("no..label", "1"), "address resolution failed for no..label:1: .*"),
        (InetAddress("::1", "1", ipv4=True, ipv6=False), "address .*: no address of the .*"),
        (InetAddress("no.invalid", "1"), "address resolution failed for no.invalid:1: .*"),
    ],
)
async def test_where_nobody_is(address: UnixAddress | InetAddress, message: str) -> None:
    async with trio.open_nursery() as tasks:
        with pytest.raises(BlockdError, match=f"^{message}$"):
            await NbdDriver.open(Target(address), tasks, read_only=False, auto_read_only=False)


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        ([], Headers.STRUCTURED),
        (["--no-sr"], Headers.SIMPLE),
        (["--mask-handshake=0"], Headers.SIMPLE),
        (["--mask-handshake=1", "--no-sr"], Headers.SIMPLE),
        (["--mask-handshake=2"], Headers.SIMPLE),
    ],
)
async def test_servers_of_all_ages(options: list[str], headers: Headers, tmp_path: Path) -> None:
    with serving(nbdkit(*options, "memory", str(SIZE)), tmp_path / "s") as process:
        connection = await connect(target(process))
        assert connection.export.headers is headers
        assert connection.export.size_bytes == SIZE
        await connection.disconnect()


async def test_a_server_from_before_the_handshake_is_refused(tmp_path: Path) -> None:
    message = "does not speak the NBD protocol that is in use"
    with (
        serving(nbdkit("--oldstyle", "memory", str(SIZE)), tmp_path / "s") as process,
        pytest.raises(BlockdError, match=message),
    ):
        await connect(target(process))


async def test_long_requests_without_data(tmp_path: Path) -> None:
    """In one piece with extended headers, else in several."""
    size = 9 << 30
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, size)
    for command in (qemu_nbd(image), nbdkit("memory", str(size))):
        with serving(command, tmp_path / "s") as process:
            async with trio.open_nursery() as tasks:
                driver = await open_driver(process, tasks)
                await driver.write(size - 512, memoryview(b"x" * 512))
                await driver.write_zeroes(0, size, unmap=True)
                await driver.discard(0, size)
                at = 0
                while at < size:
                    for run in await driver.allocation(at, size - at):
                        assert run.zero
                        at = run.extent.end
                await driver.close()


async def test_the_bitmap_of_a_server(tmp_path: Path) -> None:
    """What is dirty counts as not allocated, and nothing as zero."""
    image = tmp_path / "disk.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)],
        ["qemu-img", "bitmap", "--add", str(image), "b"],
        ["qemu-io", "-c", "write 64k 64k", str(image)],
    ):
        await trio.run_process([require_tool(command[0]), *command[1:]], capture_stdout=True)
    command = [require_tool("qemu-nbd"), "--persistent", "--shared=0", "--bitmap=b", str(image)]
    with serving(command, tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            bitmap = replace(target(process), dirty_bitmap="qemu:dirty-bitmap:b")
            driver = await NbdDriver.open(bitmap, tasks, read_only=True, auto_read_only=False)
            assert await driver.allocation(0, SIZE) == [
                Allocation(Extent(0, 65536), zero=False, depth=1),
                Allocation(Extent(65536, 65536), zero=False, depth=0),
                Allocation(Extent(131072, SIZE - 131072), zero=False, depth=1),
            ]
            await driver.close()
        with pytest.raises(BlockdError, match="requested x-dirty-bitmap qemu:x not found"):
            await connect(replace(target(process), dirty_bitmap="qemu:x"))


async def test_opening_waits_for_a_server(image: Path, tmp_path: Path) -> None:
    process = NbdProcess(qemu_nbd(image), tmp_path / "s")
    async with trio.open_nursery() as tasks:
        tasks.start_soon(trio.to_thread.run_sync, process.start)
        driver = await NbdDriver.open(
            target(process), tasks, read_only=False, auto_read_only=False, open_timeout_seconds=60
        )
        assert driver.size_bytes == SIZE
        await driver.close()
    process.kill()


def test_uris_are_qemus() -> None:
    assert Target(UnixAddress("/s"), "a b").uri == "nbd+unix:///a%20b?socket=/s"
    assert Target(UnixAddress("/s")).uri == "nbd+unix://?socket=/s"
    assert Target(InetAddress("h", "10809"), "e").uri == "nbd://h:10809/e"
    assert Target(InetAddress("::1", "1")).uri == "nbd://[::1]:1"
