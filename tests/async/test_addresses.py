"""Every kind of address, from both ends; and what is said of those that can not be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.listener import (
    Address,
    InetAddress,
    PassedAddress,
    RemoteAddress,
    UnixAddress,
    VsockAddress,
    listen,
)
from blockd.nbd import Settings
from blockd.nbd.client import NbdDriver, Target
from blockd.systemd import passed_socket
from tests.helpers.nbd_server import serving
from tests.helpers.watched_driver import WatchedDriver

ANY_CID = "4294967295"
#: An address that no other test listens at, so that a port which was free here still is.
HOST = "127.84.1.9"

pytestmark = pytest.mark.usefixtures("no_leak")


def refusal(address: Address) -> str:
    with pytest.raises(BlockdError) as raised:
        listen(address)
    return raised.value.message


async def read_over(directory: Path, server_at: Address, client_at: RemoteAddress) -> NbdDriver:
    """A disk of ones is read through a server there; the driver, closed."""
    async with serving(directory) as rig, trio.open_nursery() as tasks:
        await rig.server.stop()
        await rig.server.start(server_at, Settings())
        driver = WatchedDriver(4096)
        driver.data[:] = b"1" * 4096
        rig.export(rig.node("disk", driver), "")
        target = Target(client_at)
        client = await NbdDriver.open(target, tasks, read_only=True, auto_read_only=False)
        view = memoryview(bytearray(4096))
        await client.read(0, view)
        assert view == b"1" * 4096
        await client.close()
    return client


@pytest.fixture
def name() -> str:
    """Of an abstract socket that nobody else has."""
    return f"blockd-test-{os.getpid()}"


@pytest.mark.parametrize("tight", [True, False])
async def test_an_abstract_socket(tmp_path: Path, name: str, *, tight: bool) -> None:
    address = UnixAddress(name, abstract=True, tight=tight)
    client = await read_over(tmp_path, address, address)
    assert client.filename == f"nbd+unix://?socket={name}"
    other = UnixAddress(name, abstract=True, tight=not tight)
    listener = listen(address)
    async with trio.open_nursery() as tasks:
        with pytest.raises(BlockdError) as refused:
            await NbdDriver.open(Target(other), tasks, read_only=True, auto_read_only=False)
    assert refused.value.message == f"Failed to connect to '{name}': Connection refused"
    assert refusal(address) == f"Failed to bind socket to {name}: Address already in use"
    listener.close()


def test_names_of_abstract_sockets() -> None:
    listen(UnixAddress("x" * 107, abstract=True)).close()
    long = "x" * 108
    assert refusal(UnixAddress(long, abstract=True)) == f"UNIX socket path '{long}' is too long"


@pytest.mark.parametrize("mptcp", [False, True])
async def test_tcp(tmp_path: Path, *, mptcp: bool) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    address = InetAddress(HOST, str(port), numeric=True, mptcp=mptcp)
    client = await read_over(tmp_path, address, address)
    assert client.filename == f"nbd://{HOST}:{port}"


def free_ports() -> tuple[socket.socket, int]:
    """A port that is taken, and after which one is free."""
    while True:
        taken = socket.create_server((HOST, 0))
        port = taken.getsockname()[1]
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port + 1))
            except OSError:
                taken.close()
                continue
        return taken, port


def test_the_next_free_port() -> None:
    taken, port = free_ports()
    with taken:
        listener = listen(InetAddress(HOST, str(port), to=port + 1))
        assert listener.sockets[0].getsockname()[1] == port + 1
        busy = "Failed to find an available port: Address already in use"
        for to in (None, 0, port - 1, port, port + 1):
            assert refusal(InetAddress(HOST, str(port), to=to)) == busy
        listener.close()


def test_hosts_that_can_not_be() -> None:
    assert refusal(InetAddress("localhost", "0", numeric=True)) == (
        "address resolution failed for localhost:0: Name or service not known"
    )
    assert refusal(InetAddress("127.0.0.1", "0", ipv4=False, ipv6=False)) == (
        "Cannot disable IPv4 and IPv6 at same time"
    )


@pytest.mark.parametrize("asked", [True, False])
def test_a_client_whose_machine_is_gone_is_found_out(*, asked: bool) -> None:
    listener = listen(InetAddress("127.0.0.1", "0", keep_alive=asked))
    (sock,) = listener.sockets
    with socket.create_connection(sock.getsockname()):
        client, _ = sock.accept()
        with client:
            assert bool(client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == asked
            idle = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert (idle == limits.KEEP_ALIVE_IDLE_SECONDS) == asked
    listener.close()


# --- between a machine and its host -----------------------------------------------------------


def test_vsock() -> None:
    """No further: to reach itself a machine needs a module of the kernel that few load."""
    with socket.socket(socket.AF_VSOCK) as probe:
        probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        port = probe.getsockname()[1]
    listener = listen(VsockAddress(ANY_CID, str(port)))
    assert listener.sockets[0].getsockname() == (socket.VMADDR_CID_ANY, port)
    listener.close()
    assert Target(VsockAddress("2", "10809"), "e").uri == "nbd+vsock://2:10809/e"


def test_vsock_addresses_that_can_not_be() -> None:
    assert refusal(VsockAddress("x", "1")) == "Failed to parse cid 'x'"
    assert refusal(VsockAddress("1", "")) == "Failed to parse port ''"
    assert refusal(VsockAddress("1", "4294967296")) == "Failed to parse port '4294967296'"
    assert refusal(VsockAddress("77", "1")) == (
        "Failed to bind socket: Cannot assign requested address"
    )


# --- from systemd -----------------------------------------------------------------------------


async def test_a_socket_that_was_passed_is_there_for_the_next_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        passed.listen()
        for _ in range(2):
            await read_over(tmp_path, PassedAddress(passed.fileno()), UnixAddress(str(path)))
        assert path.exists()


def test_descriptors_that_are_no_such_sockets(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as silent:
        for fd in (file, silent.fileno()):
            assert refusal(PassedAddress(fd)).startswith(f"Descriptor {fd} is no socket")
    os.close(file)


def test_sockets_are_passed_by_name_or_number() -> None:
    here = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:b"}
    for name, fd in (("a", 3), ("b", 4), ("3", 3), ("5", 5)):
        assert passed_socket(name, here) == fd
    nameless = {**here, "LISTEN_FDNAMES": ""}
    assert passed_socket("5", nameless) == 5
    for name, environ in (
        ("c", here),
        ("6", here),
        ("2", here),
        ("-1", here),
        ("a", {}),
        ("a", {**here, "LISTEN_PID": str(os.getppid())}),
        ("a", nameless),
    ):
        with pytest.raises(BlockdError) as refused:
            passed_socket(name, environ)
        assert refused.value.message == f"The service manager has passed no socket '{name}'"
