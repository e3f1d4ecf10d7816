"""The NBD client over TLS, with servers of other people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from blockd.errors import BlockdError
from blockd.listener import UnixAddress
from blockd.nbd.client import NbdDriver, Target
from blockd.objects import Endpoint, TlsX509
from tests.helpers.certificates import Authority
from tests.helpers.nbd_process import NbdProcess, nbdkit, qemu_nbd, serving

SIZE = 4 * 1024 * 1024


class Rig:
    """An image, and certificates of both ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "disk.img"
        self.image.write_bytes(os.urandom(SIZE))
        self.authority = Authority(directory / "authority")
        self.server = self.authority.issue(directory / "server", "server")
        self.client = self.authority.issue(directory / "client", "client")

    def qemu_nbd(self, tls: Path | None = None, *, authz: bool = False) -> list[str]:
        credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={tls or self.server}"
        options = ["--object", credentials, "--tls-creds", "tls"]
        if authz:
            options += ["--object", "authz-list,id=nobody", "--tls-authz", "nobody"]
        return qemu_nbd(self.image, *options)

    @contextmanager
    def serving(self, command: list[str]) -> Iterator[NbdProcess]:
        with serving(command, self.directory / "s") as process:
            yield process

    def target(self, credentials: Path | None = None, hostname: str | None = "localhost") -> Target:
        tls = TlsX509.load(
            Endpoint.CLIENT, str(credentials or self.client), None, verify_peer=True
        ).context
        return Target(UnixAddress(str(self.directory / "s")), "", tls, "tls", hostname)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def open_driver(target: Target, tasks: trio.Nursery, *, delay: float = 0) -> NbdDriver:
    return await NbdDriver.open(
        target, tasks, read_only=False, auto_read_only=False, reconnect_delay_seconds=delay
    )


async def refusal(target: Target) -> str:
    async with trio.open_nursery() as tasks:
        with pytest.raises(BlockdError) as refused:
            await open_driver(target, tasks)
    return refused.value.message


async def copy_and_change(driver: NbdDriver, model: bytearray) -> None:
    """Read all of it, in requests that are in flight together; write to some of it."""
    step = 300_000
    copy = memoryview(bytearray(SIZE))
    async with trio.open_nursery() as nursery:
        for at in range(0, SIZE, step):
            nursery.start_soon(driver.read, at, copy[at : at + step])
    assert copy == model
    async with trio.open_nursery() as nursery:
        for at in range(0, SIZE, 2 * step):
            data = os.urandom(min(step, SIZE - at))
            model[at : at + len(data)] = data
            nursery.start_soon(driver.write, at, memoryview(data))
    await driver.flush()


async def test_qemu_nbd_is_read_and_written_also_when_it_comes_back(rig: Rig) -> None:
    model = bytearray(rig.image.read_bytes())
    with rig.serving(rig.qemu_nbd()) as process:
        async with trio.open_nursery() as tasks:
            driver = await open_driver(rig.target(), tasks, delay=60)
            await copy_and_change(driver, model)
            process.kill()
            process.start()
            await copy_and_change(driver, model)
            await driver.close()
    assert rig.image.read_bytes() == model


async def test_nbdkit_is_read_and_written(rig: Rig) -> None:
    model = bytearray(rig.image.read_bytes())
    tls = ["--tls=require", f"--tls-certificates={rig.server}", "--tls-verify-peer"]
    with rig.serving(nbdkit(*tls, "file", str(rig.image))):
        async with trio.open_nursery() as tasks:
            driver = await open_driver(rig.target(), tasks)
            await copy_and_change(driver, model)
            await driver.close()
    assert rig.image.read_bytes() == model


async def test_a_server_that_is_another_is_not_used(rig: Rig) -> None:
    stranger = Authority(rig.directory / "stranger")
    with rig.serving(rig.qemu_nbd()):
        assert await refusal(rig.target(hostname="elsewhere")) == (
            "Certificate does not match the hostname elsewhere"
        )
        assert await refusal(rig.target(hostname="10.0.0.1")) == (
            "Certificate does not match the hostname 10.0.0.1"
        )
        assert await refusal(rig.target(hostname=None)) == (
            "No hostname for certificate validation"
        )
        assert (await refusal(rig.target(hostname=".x"))).startswith("TLS handshake failed: ")
        unknown = stranger.issue(rig.directory / "other", "client")
        assert await refusal(rig.target(unknown)) == ("The certificate hasn't got a known issuer")


async def test_a_server_whose_certificate_is_too_old_is_not_used(rig: Rig) -> None:
    old = rig.authority.issue(rig.directory / "old", "server", days=-1)
    # QEMU would not take it.
    tls = ["--tls=require", f"--tls-certificates={old}"]
    with rig.serving(nbdkit(*tls, "file", str(rig.image))):
        assert await refusal(rig.target()) == "The certificate has expired"


async def test_servers_that_will_not_have_us(rig: Rig) -> None:
    nobody = rig.authority.trusted_in(rig.directory / "none")
    with rig.serving(rig.qemu_nbd()):
        refused = await refusal(rig.target(nobody))
        # Sent by the server before it hangs up, and lost where it was faster.
        assert refused.startswith("Failed to read data: ")
    with rig.serving(rig.qemu_nbd(authz=True)):
        assert (await refusal(rig.target())).startswith("Failed to read data: ")
    plain = Target(UnixAddress(str(rig.directory / "s")))
    with rig.serving(rig.qemu_nbd()):
        assert (await refusal(plain)).startswith(
            "TLS negotiation required before option 7 (go): Option 0x7 not permitted before TLS"
        )
    with rig.serving(qemu_nbd(rig.image)):
        assert await refusal(rig.target()) == (
            "Denied by server for option 5 (starttls): TLS not configured"
        )
