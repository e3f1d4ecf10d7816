"""Whose the state directory must be, for what it knows of backups is believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from blockd.errors import BlockdError
from blockd.state import StateDirectory
from tests.helpers.state_rig import Heard


async def use(path: Path, nursery: trio.Nursery) -> None:
    state = await StateDirectory.open(str(path), nursery, Heard())
    await state.close()


async def test_it_is_made_for_its_user_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "above" / "state"
    before = os.umask(0)
    try:
        await use(path, nursery)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    inside = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.rglob("*")}
    assert inside.pop("marks") == 0o700
    assert set(inside.values()) == {0o600}


@pytest.mark.parametrize("points_to", [None, "file"])
async def test_what_is_no_directory_is_refused(
    tmp_path: Path, nursery: trio.Nursery, points_to: str | None
) -> None:
    """It may be a file, or a link to nothing."""
    path = tmp_path / "state"
    path.symlink_to(points_to or "nothing")
    if points_to is not None:
        (tmp_path / points_to).touch()
    with pytest.raises(BlockdError, match=f"'{path}' is not a directory: name one"):
        await use(path, nursery)


async def test_that_it_was_made_is_durable(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    await use(tmp_path / "above" / "state", nursery)
    assert {str(tmp_path), str(tmp_path / "above"), str(tmp_path / "above" / "state")} <= {*synced}


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
@pytest.mark.parametrize("name", ["", "marks"])
async def test_one_that_others_may_write_to_is_refused(
    tmp_path: Path, nursery: trio.Nursery, mode: int, name: str
) -> None:
    path = tmp_path / "state"
    await use(path, nursery)
    (path / name).chmod(mode)
    with pytest.raises(BlockdError, match=f"its mode is {mode:04o}.*: chmod go-w '{path / name}'$"):
        await use(path, nursery)
    (path / name).chmod(mode & 0o755)
    await use(path, nursery)


async def test_one_of_another_user_is_refused(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    await use(path, nursery)
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(BlockdError, match=f"belongs to user {path.stat().st_uid},"):
        await use(path, nursery)
