"""The NBD client and nbdkit's filters, each of which takes something away or is in the way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from blockd.listener import UnixAddress
from blockd.nbd.client import NbdDriver, Target
from tests.helpers.nbd_process import nbdkit, serving

SIZE = 1 << 20
SLOTS = 8
SLOT_BYTES = SIZE // SLOTS
STEPS = 12

FILTERS = [
    [],
    ["--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-preferred=4K"],
    [
        "--filter=blocksize-policy",
        "blocksize-minimum=64K",
        "blocksize-preferred=64K",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ],
    ["--filter=cow"],
    ["--filter=delay", "delay-read=1ms", "delay-write=1ms"],
    ["--filter=exitlast"],
    ["--filter=fua", "fuamode=emulate"],
    ["--filter=fua", "fuamode=discard"],
    ["--filter=multi-conn", "multi-conn-mode=disable"],
    ["--filter=nocache"],
    ["--filter=noextents"],
    ["--filter=noparallel"],
    ["--filter=nozero", "zeromode=none"],
    ["--filter=nozero", "zeromode=emulate"],
    ["--filter=nozero", "zeromode=notrim"],
    ["--filter=rate", "rate=1G", "burstiness=10"],
    ["--filter=readahead"],
    ["--filter=retry"],
    ["--filter=error", "error-pread=EIO", "error-pread-rate=0%"],
]


async def change(driver: NbdDriver, model: bytearray, start: int, rng: random.Random) -> None:
    """Anything, again and again, within a slot of one's own; what is read is right."""
    for _ in range(STEPS):
        length = rng.choice([1, 511, 4096, 50_000])
        at = start + rng.randrange(SLOT_BYTES - length)
        match rng.randrange(4):
            case 0:
                await driver.write_zeroes(at, length, unmap=rng.random() < 0.5)
                model[at : at + length] = bytes(length)
            case 1:
                await driver.flush()
            case _:
                data = rng.randbytes(length)
                await driver.write(at, memoryview(data))
                model[at : at + length] = data
        view = memoryview(bytearray(length))
        await driver.read(at, view)
        assert view == model[at : at + length]


@pytest.mark.parametrize("options", FILTERS, ids=lambda options: " ".join(options[:2]) or "none")
async def test_what_is_written_is_read(options: list[str], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    filters = [option for option in options if option.startswith("--")]
    command = nbdkit(*filters, "file", str(image), *options[len(filters) :])
    model = bytearray(SIZE)
    with serving(command, tmp_path / "s") as process:
        async with trio.open_nursery() as tasks:
            target = Target(UnixAddress(str(process.socket_path)))
            driver = await NbdDriver.open(target, tasks, read_only=False, auto_read_only=False)
            async with trio.open_nursery() as nursery:
                for slot in range(SLOTS):
                    start = slot * SLOT_BYTES
                    nursery.start_soon(change, driver, model, start, random.Random(slot))
            at = 0
            while at < SIZE:
                for run in await driver.allocation(at, SIZE - at):
                    at = run.extent.end
                    assert not run.zero or not any(model[run.extent.offset : at])
            await driver.flush()
            await driver.close()
    if "--filter=cow" not in options:
        assert image.read_bytes() == model
