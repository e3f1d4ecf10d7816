"""Where a server may listen, what is said where it can't, and how it takes clients."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from blockd import limits, listener
from blockd.errors import BlockdError
from blockd.events import Bus
from blockd.listener import Address, InetAddress, Listener, UnixAddress, listen
from blockd.nbd import NbdServer, Settings

FOREIGN = "192.0.2.1"  # RFC 5737: nobody's

pytestmark = pytest.mark.usefixtures("no_leak")


def refusal(address: Address) -> str:
    with pytest.raises(BlockdError) as raised:
        listen(address)
    return raised.value.message


def hosts(listener: Listener) -> list[str]:
    found = [str(sock.getsockname()[0]) for sock in listener.sockets]
    listener.close()
    return found


# --- in the file system -----------------------------------------------------------------------


def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    listen(UnixAddress(str(path))).close()
    assert not path.exists()

    path.write_bytes(b"data")
    assert refusal(UnixAddress(str(path))) == (
        f"Failed to bind socket to {path}: Address already in use"
    )
    assert path.read_bytes() == b"data"
    path.unlink()
    path.mkdir()
    assert "Address already in use" in refusal(UnixAddress(str(path)))


def test_paths_that_can_not_be(tmp_path: Path) -> None:
    none = f"{tmp_path}/none/s"
    assert refusal(UnixAddress(none)) == (
        f"Failed to bind socket to {none}: No such file or directory"
    )
    long = f"{tmp_path}/{'x' * 108}"
    assert refusal(UnixAddress(long)) == f"UNIX socket path '{long}' is too long"
    assert refusal(UnixAddress("")) == "UNIX socket path is empty"


def test_the_longest_path(tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(107, "x")
    listener = listen(UnixAddress(path))
    assert Path(path).exists()
    listener.close()
    assert not Path(path).exists()


def test_the_mode_is_as_asked_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for umask, mode, seen in ((0, 0o600, 0o600), (0o777, 0o666, 0o666), (0o077, None, 0o700)):
        before = os.umask(umask)
        try:
            listener = listen(UnixAddress(str(path), mode))
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == seen
        listener.close()


def test_another_ones_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(UnixAddress(str(path)))
    path.unlink()
    second = listen(UnixAddress(str(path)))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_a_live_socket_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(UnixAddress(str(path)))
    with pytest.raises(BlockdError, match="Address already in use"):
        listen(UnixAddress(str(path)))
    assert path.exists()
    first.close()


# --- on the network ---------------------------------------------------------------------------


def test_a_port_of_one_family_or_both() -> None:
    assert hosts(listen(InetAddress("127.0.0.1", "0"))) == ["127.0.0.1"]
    assert hosts(listen(InetAddress("", "0", ipv4=True, ipv6=False))) == ["0.0.0.0"]
    assert hosts(listen(InetAddress("", "0", ipv4=True))) == ["0.0.0.0"]
    assert hosts(listen(InetAddress("", "0", ipv6=False))) == ["0.0.0.0"]


def test_addresses_that_can_not_be() -> None:
    assert refusal(InetAddress(FOREIGN, "0")) == (
        "Failed to bind socket: Cannot assign requested address"
    )
    assert refusal(InetAddress("127.0.0.1", "wat")) == (
        "address resolution failed for 127.0.0.1:wat: Servname not supported for ai_socktype"
    )
    assert refusal(InetAddress("127.0.0.1", "0", ipv4=False)).startswith(
        "address resolution failed for 127.0.0.1:0: "
    )
    for port in ("65536", "99999", "4294967297"):
        assert refusal(InetAddress("127.0.0.1", port)) == (
            f"address resolution failed for 127.0.0.1:{port}: "
            "Servname not supported for ai_socktype"
        )
    # Names that Python does not even ask for.
    for host in ("x" * 64, "a..b"):
        assert refusal(InetAddress(host, "0")) == (
            f"address resolution failed for {host}:0: Name or service not known"
        )


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert refusal(InetAddress("nohost.invalid", "10809")) == (
        "address resolution failed for nohost.invalid:10809: Name or service not known"
    )


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refusal(InetAddress("127.0.0.1", port)) == (
            "Failed to find an available port: Address already in use"
        )


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_of_a_name_only_the_addresses_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve_to(monkeypatch, FOREIGN, "127.0.0.1", FOREIGN, "127.0.0.1")
    assert hosts(listen(InetAddress("both", "0"))) == ["127.0.0.1"]
    resolve_to(monkeypatch, FOREIGN)
    assert "Cannot assign requested address" in refusal(InetAddress("none", "0"))


def test_a_listener_that_fails_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    real = socket.socket.listen

    def second_fails(sock: socket.socket, backlog: int) -> None:
        if sock.getsockname()[0] == "127.0.0.2":
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        real(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", second_fails)
    assert "Address already in use" in refusal(InetAddress("two", "0"))


# --- taking clients ---------------------------------------------------------------------------


class Failing(socket.socket):
    """A listening socket at which something is wrong with every client."""

    trouble = errno.EMFILE

    def accept(self) -> Any:
        raise OSError(self.trouble, os.strerror(self.trouble))


async def test_a_client_that_can_not_be_taken_waits_and_is_told_of_now_and_then(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    with Failing(socket.AF_UNIX) as sock:
        listener = Listener([sock])
        began = trio.current_time()
        while trio.current_time() < began + 1.5 * limits.ACCEPT_COMPLAINT_SECONDS:
            before = trio.current_time()
            assert await listener.accept(sock) is None
            assert trio.current_time() >= before + limits.ACCEPT_PAUSE_SECONDS
    assert [record.getMessage() for record in caplog.records] == [
        "new clients can't be accepted, and wait: [Errno 24] Too many open files"
    ] * 2


@pytest.mark.parametrize("trouble", [errno.EAGAIN, errno.ECONNABORTED])
async def test_a_client_that_has_gone_costs_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    monkeypatch.setattr(Failing, "trouble", trouble)
    with Failing(socket.AF_UNIX) as sock:
        assert await Listener([sock]).accept(sock) is None
    assert caplog.records == []


async def test_a_client_by_tcp() -> None:
    async with trio.open_nursery() as nursery:
        server = NbdServer(nursery, Bus())
        await server.start(InetAddress("127.0.0.1", "0"), Settings())
        assert server._running is not None
        port = server._running.listener.sockets[0].getsockname()[1]
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert await stream.receive_some(8) == b"NBDMAGIC"
        await server.stop()


def test_a_port_that_can_not_be_had_as_wanted_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[socket.socket] = []

    def refuse(sock: socket.socket) -> None:
        made.append(sock)
        raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    monkeypatch.setattr(listener, "keep_alive", refuse)
    with pytest.raises(BlockdError, match="Failed to bind socket: Protocol not available"):
        listen(InetAddress("127.0.0.1", "0"))
    assert [sock.fileno() for sock in made] == [-1]
