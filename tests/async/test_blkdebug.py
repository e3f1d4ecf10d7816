"""``blkdebug``: which request an injected error strikes."""

from __future__ import annotations

import errno

import pytest

from blockd.block import Node
from blockd.block.drivers.blkdebug import BlkdebugDriver, InjectError, SetState
from tests.helpers.memory_driver import MemoryDriver

DATA = memoryview(b"x" * 512)


def blkdebug(*errors: InjectError, transitions: tuple[SetState, ...] = ()) -> BlkdebugDriver:
    child = Node("below", MemoryDriver(64 * 1024))
    return BlkdebugDriver(child, errors=errors, transitions=transitions)


async def outcome(driver: BlkdebugDriver, operation: str, offset: int = 0) -> int:
    """The errno of one request; 0 where it went well."""
    try:
        match operation:
            case "read":
                await driver.read(offset, memoryview(bytearray(512)))
            case "write":
                await driver.write(offset, DATA)
            case "write-zeroes":
                await driver.write_zeroes(offset, 512, unmap=True)
            case "discard":
                await driver.discard(offset, 512)
            case "flush":
                await driver.flush()
            case "block-status":
                await driver.allocation(offset, 512)
    except OSError as error:
        return error.errno or 0
    return 0


KINDS = ["read", "write", "write-zeroes", "discard", "flush", "block-status"]


@pytest.mark.parametrize("struck", KINDS)
async def test_an_error_strikes_its_kind_only(struck: str) -> None:
    driver = blkdebug(InjectError("none", io_type=struck, errno=errno.ENOSPC))
    assert {kind for kind in KINDS if await outcome(driver, kind) == errno.ENOSPC} == {struck}


async def test_without_a_kind_all_but_block_status_fail() -> None:
    driver = blkdebug(InjectError("none", immediately=True))
    assert [await outcome(driver, kind) for kind in KINDS] == [errno.EIO] * 5 + [0]


async def test_a_sector_is_struck_and_what_touches_it() -> None:
    driver = blkdebug(InjectError("none", sector=2))
    assert [await outcome(driver, "read", 512 * at) for at in range(4)] == [0, 0, errno.EIO, 0]
    assert await outcome(driver, "flush") == 0


async def test_once_is_once() -> None:
    driver = blkdebug(InjectError("none", once=True), InjectError("pwritev", once=True))
    assert [await outcome(driver, "read") for _ in range(3)] == [errno.EIO, 0, 0]
    assert [await outcome(driver, "write") for _ in range(3)] == [errno.EIO, 0, 0]


async def test_an_event_arms_its_errors_in_place_of_those_before() -> None:
    driver = blkdebug(
        InjectError("l2_load", io_type="read", errno=errno.EIO),
        InjectError("l2_update", io_type="write", errno=errno.ENOSPC),
    )
    assert await outcome(driver, "read") == 0
    driver.debug_event("l2_load")
    assert await outcome(driver, "read") == errno.EIO
    driver.debug_event("cluster_alloc")
    assert await outcome(driver, "read") == errno.EIO
    driver.debug_event("l2_update")
    assert await outcome(driver, "read") == 0
    assert await outcome(driver, "write") == errno.ENOSPC


async def test_states() -> None:
    driver = blkdebug(
        InjectError("flush_to_disk", state=2),
        transitions=(SetState("l2_load", 2, state=1), SetState("pwritev", 1, state=2)),
    )
    assert await outcome(driver, "flush") == 0
    driver.debug_event("l2_load")
    assert await outcome(driver, "flush") == errno.EIO
    assert await outcome(driver, "write") == errno.EIO, "the error stays armed"


async def test_nothing_passes_unseen() -> None:
    child = Node("below", memory := MemoryDriver(64 * 1024))
    memory.nowait = lambda _: True
    driver = BlkdebugDriver(child, errors=[InjectError("none")])
    node = Node("top", driver)
    assert node.descriptor() is None
    assert not node.takes_write_by
    assert await outcome(driver, "read") == errno.EIO
    assert memory.counts["read"] == 0


async def test_errno_0_is_no_error() -> None:
    assert await outcome(blkdebug(InjectError("none", errno=0)), "read") == 0
