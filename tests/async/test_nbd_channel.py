"""A channel's own promises: replies never get into each other, receiving ends where it must."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blockd import limits
from blockd.nbd.activity import Activity
from blockd.nbd.channel import Channel, ClientGone
from tests.helpers.turns import counted_turns

#: More than a socket takes.
LARGE = memoryview(b"a" * 4 * 1024 * 1024)


class Pair:
    """A channel and the client's end of it."""

    def __init__(self) -> None:
        ours, self.client = socket.socketpair()
        ours.setblocking(False)
        self._ours = ours
        self.activity = Activity()
        self.channel = Channel(ours, self.activity)

    def close(self) -> None:
        self._ours.close()
        self.client.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


async def test_a_burst_waits_for_a_reply_that_is_half_sent(pair: Pair) -> None:
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.channel.send, LARGE)
        await wait_all_tasks_blocked()
        # There is room now, and the sender has not been told of it yet.
        received += pair.client.recv(1024 * 1024)
        nursery.start_soon(pair.channel.send_burst, memoryview(b"bbbb"))
        nursery.start_soon(pair.channel.send, memoryview(b"cc"), memoryview(b"cc"))
        while len(received) < len(LARGE) + 8:
            await trio.lowlevel.wait_readable(pair.client)
            received += pair.client.recv(1024 * 1024)
    assert received[: len(LARGE)] == LARGE
    assert bytes(received[len(LARGE) :]) in (b"bbbbcccc", b"ccccbbbb")


async def test_a_burst_that_the_socket_takes_in_part_is_completed(pair: Pair) -> None:
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.channel.send_burst, LARGE)
        await wait_all_tasks_blocked()
        nursery.start_soon(pair.channel.send_burst, memoryview(b"bbbb"))
        while len(received) < len(LARGE) + 4:
            await trio.lowlevel.wait_readable(pair.client)
            received += pair.client.recv(1024 * 1024)
    assert received == bytes(LARGE) + b"bbbb"


async def test_the_end_of_the_client_is_seen(pair: Pair) -> None:
    view = memoryview(bytearray(10))
    pair.client.send(b"xyz")
    assert await pair.channel.receive_some_into(view) == 3
    assert bytes(view[:3]) == b"xyz"
    pair.client.close()
    assert await pair.channel.receive_into(view) == 0
    with pytest.raises(ClientGone):
        await pair.channel.receive_some_into(view)


async def test_a_wait_for_the_client_can_be_cancelled(pair: Pair) -> None:
    view = memoryview(bytearray(10))
    with pair.activity.serving():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.channel.receive_into, view)
            await wait_all_tasks_blocked()
            assert pair.activity._busy == 0
            nursery.cancel_scope.cancel()
        assert pair.activity._busy == 1
    pair.client.send(b"later")
    assert await pair.channel.receive_into(view) == 5


async def test_a_client_that_always_has_more_to_say_lets_others_in(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.client.send(bytes(100))
    async with counted_turns(monkeypatch) as turns:
        for _ in range(100):
            await pair.channel.receive_into(memoryview(bytearray(1)))
        assert 10 <= turns() <= 50


@pytest.mark.parametrize(("short_seconds", "spins"), [(60.0, 4), (0.0, 1)])
async def test_spins_come_back_after_short_waits(
    monkeypatch: pytest.MonkeyPatch, short_seconds: float, spins: int
) -> None:
    """A client that was slow for a while must not be waited for through the loop for ever."""
    monkeypatch.setattr(limits, "NBD_SHORT_WAIT_SECONDS", short_seconds)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        channel = Channel(ours, Activity())
        channel._spins = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.receive_into, memoryview(bytearray(1)))
            await wait_all_tasks_blocked()
            theirs.send(b"x")
        assert channel._spins == spins


@pytest.mark.parametrize("rest", [False, True])
async def test_nobody_spins_for_the_rest_of_something_or_while_requests_run(
    monkeypatch: pytest.MonkeyPatch, *, rest: bool
) -> None:
    monkeypatch.setattr(limits, "NBD_SHORT_WAIT_SECONDS", 60.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        channel = Channel(ours, Activity())
        channel._spins = 2
        async with trio.open_nursery() as nursery:
            no_spin = partial(channel.receive_into, spin=False)
            receive = channel.receive_some_into if rest else no_spin
            nursery.start_soon(receive, memoryview(bytearray(1)))
            await wait_all_tasks_blocked()
            theirs.send(b"x")
        assert channel._spins == 2
