"""Objects by id, and what they are made of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from blockd import limits
from blockd.errors import BlockdError
from blockd.objects import (
    Bucket,
    Endpoint,
    Iothread,
    Objects,
    Secret,
    ThrottleGroup,
    ThrottleLimits,
    TlsPsk,
)


def refusal(error: pytest.ExceptionInfo[BlockdError]) -> str:
    return error.value.message


# -- by id ---------------------------------------------------------------------------------------


def test_an_object_is_found_by_its_id_and_kind() -> None:
    objects = Objects()
    secret, thread = Secret(b"x"), Iothread()
    for name, made in (("s", secret), ("t", thread)):
        objects.check_id(name)
        objects.add(name, made)
    assert objects.find("s", Secret) is secret
    assert objects.find("t", Iothread) is thread
    assert objects.find("t", Secret) is None
    assert objects.find("u", Secret) is None
    assert "t" in objects
    assert "u" not in objects


def test_what_something_needs_stays() -> None:
    objects = Objects()
    group = ThrottleGroup(ThrottleLimits())
    objects.add("g", group)
    group.users += 1
    with pytest.raises(BlockdError) as refused:
        objects.remove("g")
    assert refusal(refused) == "object 'g' is in use, can not be deleted"
    assert objects.find("g", ThrottleGroup) is group
    group.users -= 1
    objects.remove("g")
    assert "g" not in objects


# -- secrets -------------------------------------------------------------------------------------


def test_a_secret_is_taken_as_it_is_or_decoded(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for text, value in ((b"\xff\x00\n", None), (b"eA==\n", b"x"), (b"", b"")):
        path.write_bytes(text)
        assert Secret.of(None, str(path), is_base64=False).value == text
        if value is not None:
            assert Secret.of(None, str(path), is_base64=True).value == value
            assert Secret.of(text.decode(), None, is_base64=True).value == value


def test_a_secret_is_not_shown() -> None:
    assert "hunter2" not in repr(Secret(b"hunter2"))
    assert "hunter2" not in repr(TlsPsk(Endpoint.SERVER, None, {"u": b"hunter2"}, None))


@pytest.mark.parametrize("text", ["eA", "eA=", "eA==eA==", "="])
def test_half_a_secret_is_none(text: str) -> None:
    with pytest.raises(BlockdError, match="Base64 data is cut off, or padded in its middle"):
        Secret.of(text, None, is_base64=True)


def test_files_that_are_no_secrets(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(bytes(limits.SECRET_BYTES + 1))
    for path, reason in ((pipe, "it is not a regular file"), (large, "over 1048576 bytes")):
        with pytest.raises(BlockdError) as refused:
            Secret.of(None, str(path), is_base64=False)
        assert refusal(refused) == f"Unable to read {path}: {reason}"


@pytest.mark.usefixtures("no_leak")
def test_a_directory_is_no_secret_and_is_not_kept_open(tmp_path: Path) -> None:
    with pytest.raises(BlockdError, match="Is a directory"):
        Secret.of(None, str(tmp_path), is_base64=False)


# -- keys ----------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text("# a comment\n\nqemu:00fF\nother:11\n")
    return path


def test_both_ends_get_the_keys(keys: Path) -> None:
    found = {"qemu": b"\x00\xff", "other": b"\x11"}
    server = TlsPsk.load(Endpoint.SERVER, str(keys.parent), None)
    assert (server.keys, server.username) == (found, None)
    for asked, user in ((None, "qemu"), ("other", "other")):
        client = TlsPsk.load(Endpoint.CLIENT, str(keys.parent), asked)
        assert (client.keys, client.username) == (found, user)


def test_a_user_without_a_key(keys: Path) -> None:
    with pytest.raises(BlockdError) as refused:
        TlsPsk.load(Endpoint.CLIENT, str(keys.parent), "nobody")
    assert refusal(refused) == f"Username nobody not found in PSK file {keys}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"qemu:00\nnonsense\n", "Line 2 of PSK file {} is not USER:HEX"),
        (b":00\n", "Line 1 of PSK file {} is not USER:HEX"),
        (b"qemu:zz\n", "PSK file {} has a key that is not hexadecimal"),
        (b"qemu:00\n\xff:00\n", "PSK file {} has a key that is not hexadecimal"),
    ],
)
def test_a_file_that_has_no_keys(keys: Path, content: bytes, reason: str) -> None:
    keys.write_bytes(content)
    with pytest.raises(BlockdError) as refused:
        TlsPsk.load(Endpoint.SERVER, str(keys.parent), None)
    assert refusal(refused) == reason.format(keys)


# -- throttling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(ThrottleLimits)[:6]])
def test_every_limit_is_looked_at(name: str) -> None:
    def check(bucket: Bucket) -> None:
        told: dict[str, Any] = {name: bucket}
        ThrottleLimits(**told).check()

    check(Bucket(1, 2, 3))
    with pytest.raises(BlockdError, match="bps_max/iops_max cannot be lower than bps/iops"):
        check(Bucket(2, 1))
    with pytest.raises(BlockdError, match="must be within"):
        check(Bucket(-1))
